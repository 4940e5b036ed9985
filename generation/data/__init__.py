"""Token shards: how data sets become tokens, and how tokens become training samples."""
