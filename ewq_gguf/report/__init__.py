"""Records to tables and pictures that people read."""
