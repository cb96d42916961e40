"""An OpenAI-compatible HTTP server on the continuous batcher (``phi35 serve``)."""
