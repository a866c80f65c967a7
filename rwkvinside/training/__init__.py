"""The training loop: engines, schedule, checkpoints, metrics.

Knows a `Step`, nothing of objectives or models.
"""
