"""Checkpoints: name rules as data, streaming reader, writer."""
