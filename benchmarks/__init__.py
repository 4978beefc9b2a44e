"""Runnable comparisons; each prints a table and can write JSON."""
