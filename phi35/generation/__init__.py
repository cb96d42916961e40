"""Decoding: the loop, sampling, stopping and streaming."""
