"""A model behind HTTP: one thread that owns it, a bounded queue before it, and what may go wrong on the way."""
