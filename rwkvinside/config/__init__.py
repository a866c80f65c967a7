"""The typed configuration: its tree, defaults, how files and flags become one, how it is shown."""
