"""How the points of a multirun are found: one module a kind."""
