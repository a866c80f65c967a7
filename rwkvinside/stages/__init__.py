"""Stages of a conversion: what makes each objective what it is."""
