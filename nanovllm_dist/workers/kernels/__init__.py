"""Triton kernels of the CUDA platform, each a plain function over tensors. Nothing here knows requests or steps."""
