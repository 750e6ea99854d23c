"""Trackers: where a run's records are shown beside those of other runs."""
