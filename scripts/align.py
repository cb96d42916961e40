"""Alignment with preferences: DPO or IPO, of an adapter or of all weights, on pairs of replies, also about pictures.

    python scripts/align.py                                                 # a tiny sparse model on pairs made here
    deepspeed --num_gpus 8 scripts/align.py --config recipes/dpo.yaml data=pairs.jsonl
    python scripts/align.py model=runs/finetune/model data=pairs.jsonl preference.beta=0.05 preference.loss=ipo
    deepspeed scripts/align.py model=folder data=pairs.jsonl adapter=null preference.reference=precomputed

Each line of the data: {"messages": [the prompt's turns], "chosen": "...", "rejected": "...", "images": ["a.png"]}
(phi35/data/preferences.py has the other forms). With an adapter the reference is the model without it; else its
log-probabilities are computed before the first step and kept in OUTPUT_DIR/reference_log_probs.safetensors. The
router's balance loss stays in the objective. preference.reference=none is reference-free.
"""

import json
import sys
from pathlib import Path

from phi35.cli.train import run

DEFAULTS = {
    "model": "tiny-phi-3.5-moe",
    "data": "runs/align/pairs.jsonl",
    "sequence_length": 256,
    "global_batch_size": 4,
    "max_steps": 30,
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "warmup_steps": 3,
    "adapter": {"rank": 16, "alpha": 32},
    "preference": {"loss": "sigmoid", "beta": 0.1},
    "output_dir": "runs/align",
}


def write_example(path: Path) -> None:
    """Pairs for a run without data: of two sums the right one is preferred."""
    if path.is_file():
        return
    lines = []
    for left in range(10):
        for right in range(10):
            messages = [{"role": "user", "content": f"What is {left} + {right}?"}]
            pair = {"chosen": str(left + right), "rejected": str(left + right + 1 + left % 3)}
            lines.append(json.dumps({"messages": messages, **pair}))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{id(lines)}")  # each rank its own, renamed into place
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    if not any(argument.startswith(("data=", "--config", "-h", "--help")) for argument in sys.argv[1:]):
        write_example(Path(str(DEFAULTS["data"])))
    sys.exit(run(DEFAULTS, description=__doc__))
