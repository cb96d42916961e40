"""Products with quantized weights on a CPU: a C kernel, compiled where it is first used."""
