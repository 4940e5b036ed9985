"""Measures of generated images, and of a generator on given ones, each with its protocol."""
