"""All that is measured on a GPU, in one command that always ends in time and keeps what it has measured.

`session.py` is the parent, `stage.py` the child process of one stage; every other file is a stage, or what they share.
"""
