"""Generated answers: prompts through chat templates, greedy decoding, scores."""
