"""Small things that every package may use and that know nothing of the rest."""
