"""Benchmark of the WKV-7 kernels beside what one would use instead: `python -m rwkvinside.kernels.bench`."""
