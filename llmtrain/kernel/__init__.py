"""Faster ways to compute what a model or a loss already defines; only the engine imports them."""
