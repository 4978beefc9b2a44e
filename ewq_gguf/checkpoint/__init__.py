"""What a checkpoint is, how its bytes are read, and the built-in model."""
