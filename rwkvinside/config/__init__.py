"""The typed configuration of a run.

Its tree, its defaults, how files and flags become one configuration, and how it is shown.
"""
