"""Checkpoints: their files, their tensors, their weights; and the built-in model."""
