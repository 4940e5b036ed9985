"""From a transformer to codes: decoding of whole images, sampling of one code, guidance."""
