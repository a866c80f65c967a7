"""What ships with the package, as `rwkvinside.recipes`: `recipes/`, one YAML per teacher, and `variants/`."""
