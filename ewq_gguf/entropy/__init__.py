"""Arrays to numbers, pure: code counts, entropies, layer aggregation."""
