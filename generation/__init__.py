"""LaytonGen: text to image tokens to images, and the alternative decoders."""
