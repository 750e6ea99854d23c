"""llmtrain: one runner that composes, plans and trains language models."""
