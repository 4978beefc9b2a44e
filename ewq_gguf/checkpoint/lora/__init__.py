"""LoRA adapters, merged into a checkpoint: a copy in the cache, then the model."""
