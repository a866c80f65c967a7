"""Vectors to text, one decoder a file, behind `registry.build_decoder`; and a model that smooths what they write."""
