"""Text generation: decoding loop, sampling, stopping, streaming."""
