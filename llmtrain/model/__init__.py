"""Models: what is trained, from a configuration or from weights."""
