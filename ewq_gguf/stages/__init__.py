"""What each stage does with one checkpoint, before and after a plan is made."""
