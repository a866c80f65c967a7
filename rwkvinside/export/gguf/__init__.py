"""GGUF files for llama.cpp: layout of the tensors, tokenizer, writing, and what llama.cpp computes of them."""
