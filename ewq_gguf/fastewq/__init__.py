"""FastEWQ: a classifier of layers by their size and depth, without their weights."""
