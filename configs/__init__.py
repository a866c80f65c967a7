"""What ships with the package, as `rwkvinside.recipes`: YAML files in `teachers/`, `recipes/`, `variants/` and `lm/`."""
