"""What a run would do and need, from shapes alone."""
