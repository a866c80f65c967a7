"""Sequence mixers behind one interface, one architecture a file; see `base` for what all of them promise."""
