"""A few pairs of replies, about sums and, for models that see, about pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_pairs(folder, pictures=False, count=12):
    """``pairs.jsonl`` in a folder; every other pair with one or two pictures where asked for."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    lines = []
    for number in range(count):
        record = {"messages": [{"role": "user", "content": f"What is {number} + {number % 5}?"}]}
        record |= {"chosen": f"It is {number + number % 5}.", "rejected": "no " * (1 + number % 4)}
        if number % 3 == 0:  # an earlier reply of the prompt is nobody's choice
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ask me."}]
            record["messages"] = turns + record["messages"]
        if pictures and number % 2 == 0:
            record["images"] = []
            for image in range(1 + number % 4 // 2):
                name = f"{number}_{image}.png"
                size = (40 + number, 64, 3)
                Image.fromarray(draw.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
                record["images"].append(name)
        lines.append(json.dumps(record))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)
