"""A few webdataset shards with small pictures, for training runs in tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vision.shard_writer import ShardWriter


def write_picture_shards(folder: Path, num_samples: int = 24) -> str:
    """Samples of one or two pictures of 64 pixels with a question and an answer; returns the folder."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for number in range(num_samples):
            pictures = []
            for _ in range(1 + number % 2):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
                pictures.append(("png", buffer.getvalue()))
            turns = [
                {"role": "user", "content": f"What is shown in picture {number}?"},
                {"role": "assistant", "content": f"Noise of kind {number * 7 % 5}."},
            ]
            writer.write(f"sample-{number:03d}", {"messages": turns}, pictures)
    return str(folder)
