"""Memory, time and settings of a training run, worked out before it starts."""
