"""Triton kernels of the "triton" experts backend: routing, row movement, grouped products, decode.

``moe.kernels.backend`` is the entry; importing this package imports no Triton.
"""
