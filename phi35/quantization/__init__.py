"""Weight-only quantization: formats, rounding, modules, streaming conversion, kernels."""
