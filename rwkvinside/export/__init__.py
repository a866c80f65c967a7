"""Exports of a finished run, each verified in a fresh process before it gets its name."""
