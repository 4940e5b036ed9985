"""`layton fit`, `validate` and `test`: run files, their options, and the trainer that Lightning makes of them."""
