"""Students for MLX, on Apple silicon: mlx-lm loads them with the model file that they carry."""
