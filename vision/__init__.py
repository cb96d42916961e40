"""The image side of Phi-3.5-vision: transform, tower, projector, data."""
