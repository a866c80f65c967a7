"""The teacher's side of a stage: loading, distributions, logits on disk."""
