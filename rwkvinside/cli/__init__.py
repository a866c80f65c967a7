"""The `rwkvinside` command, one file a verb; arguments and what is printed, no work."""
