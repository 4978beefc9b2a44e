"""A plan, and the file that is made and verified from it."""
