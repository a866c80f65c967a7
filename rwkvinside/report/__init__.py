"""Pictures of what a run has measured: metrics.jsonl -> PNGs. Imports nothing of the models."""
