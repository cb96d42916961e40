"""Training: config, DeepSpeed engine, loop, data, checkpoints."""
