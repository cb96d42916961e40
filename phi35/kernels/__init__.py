"""Triton kernels of the base decoder: training, and the decoding step. What imports Triton is imported when used."""
