"""Benchmark of the WKV-7 kernels and their alternatives: `python -m rwkvinside.kernels.bench`."""
