"""The student in training: the teacher's own model with mixers in place of attention layers."""
