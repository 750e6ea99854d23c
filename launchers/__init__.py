"""How a planned run starts. Each launcher is handed what to run and imports none of it."""
