"""Recipes shipped with the package, one YAML per teacher; importable as `rwkvinside.recipes`."""
