"""Runs the points of a multirun, several at a time, and what they teach about the next."""

from llmtrain.trials.sweep import sweep

__all__ = ["sweep"]
