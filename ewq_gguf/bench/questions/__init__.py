"""Questions: their files, their prompts, and how a model is asked them."""
