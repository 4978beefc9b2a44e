"""Records to a Plan, pure: no files, no processes, no network."""
