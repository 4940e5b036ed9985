"""Losses between images: pixels, features of a small network trained here, and a patch discriminator."""
