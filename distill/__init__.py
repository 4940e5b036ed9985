"""Diffusion and flow mathematics, and the distillation methods written against it."""
