"""Around the distillation of text-to-image models: what comes out, pairs of a teacher, scorers and applications."""
