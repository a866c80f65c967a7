"""Checkpoints of other programs as runs of this one."""
