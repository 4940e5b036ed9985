"""LaytonGen's transformer: its parts, what it hears, and the forms that it has for decoding on one machine."""
