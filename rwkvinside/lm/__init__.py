"""Hybrids as language models of their own: trained from scratch, processed by their state, evaluated on long text."""
