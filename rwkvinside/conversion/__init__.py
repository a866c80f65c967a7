"""The pipeline: a configuration becomes a trained student, stage after stage."""
