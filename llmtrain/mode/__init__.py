"""Modes: a batch and a loss each, nothing else."""
