"""Triton kernels of the base decoder and its training. Modules here import Triton; nothing imports them before use."""
