"""How close a student is to its teacher, and how fast it decodes."""
