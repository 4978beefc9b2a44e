"""Stages of a run: each does one thing with the model that is opened."""
