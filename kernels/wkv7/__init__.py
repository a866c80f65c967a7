"""Compiled WKV-7 kernels (Triton, native CPU). None ships in this version: `rwkvinside.modeling.wkv7` runs on PyTorch
alone."""
