"""Another trainer's settings as an experiment of ours: `python -m llmtrain.migrate`."""
