"""Parts of `layton.quantizer`, which is where to import them from."""
