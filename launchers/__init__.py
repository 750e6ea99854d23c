"""How a planned run starts: each launcher is handed a run folder and imports nothing of llmtrain's."""
