"""Measurements of llmtrain, and the pictures of its README."""
