"""Callbacks: what looks on while a run trains, and may ask for its end."""
