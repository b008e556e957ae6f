"""Running a model: prompts become ids, rows share a batch, hooks come and go."""
