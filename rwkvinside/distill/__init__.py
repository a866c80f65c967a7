"""Distillation: the student in training, its start, its objectives, and where the teacher's side comes from."""
