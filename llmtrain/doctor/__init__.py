"""What this machine can do, and what is wrong with it: `python -m llmtrain.doctor`."""
