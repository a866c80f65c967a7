"""The portable model: what an export carries. Needs torch and transformers only."""
