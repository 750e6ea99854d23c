"""Adapters: which of a model's parameters are trained."""
