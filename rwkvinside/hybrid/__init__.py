"""The student in training: the teacher's own model with mixers for attention."""
