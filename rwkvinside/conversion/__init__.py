"""The pipeline: a configuration becomes data, student, engine and trainer, stage after stage."""
