"""The model file of exports for MLX: alone there, it imports nothing from here, and nothing here imports it."""
