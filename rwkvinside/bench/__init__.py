"""Benchmarks of training, side by side in one run. Those of the kernels stay with the kernels."""
