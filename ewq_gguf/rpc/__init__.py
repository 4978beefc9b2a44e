"""Placement of a model's layers on llama.cpp's RPC workers, and their commands."""
