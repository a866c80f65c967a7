"""A run on disk: its directory, its metrics, and the trained model that is read back from it."""
