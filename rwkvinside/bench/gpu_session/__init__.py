"""All that is measured on a GPU, in one command that always ends in time and keeps what it has measured.

`session.py` is the parent, `stage.py` the child process of one stage, `tables.py` writes the docs; every other file is
a stage, or what they share. All models have random weights: no published teacher is converted.
"""
