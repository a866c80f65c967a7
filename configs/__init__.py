"""What ships with the package: `recipes/`, one YAML per teacher, and `variants/`; importable as `rwkvinside.recipes`."""
