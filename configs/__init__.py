"""What ships with the package, as `rwkvinside.recipes`: YAML in `teachers/`, `recipes/`, `variants/` and `lm/`."""
