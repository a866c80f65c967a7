"""Teacher families: everything that differs between teachers, one file each.

docs/families.md tells how to add one.
"""
