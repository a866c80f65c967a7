"""Talking to saved models: conversations that go on from a state, prompts in batches, the terminal."""
