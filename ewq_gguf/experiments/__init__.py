"""Experiments: files of one model measured alike, paired and recorded."""
