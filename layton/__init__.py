"""The Layton tokenizer: an image becomes 256 tokens and comes back (arXiv 2503.08377)."""

__version__ = "0.1.0"
