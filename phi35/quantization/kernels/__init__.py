"""Triton kernels for weights in few bits. Import the modules only where Triton is installed."""
