"""What ships with the package, as `rwkvinside.recipes`: teachers, recipes, variants, language and vector models."""
