"""`layton reproduce`: one paper's headline claim, measured again in the embedded world at equal budgets."""
