"""Teaches a small tower what its training pictures show, before it meets the decoder.

python scripts/pretrain_tower.py --output runs/small/tower.safetensors --device cuda --workers 12
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from phi35.presets import get
from vision.pretraining import PretrainingConfig, pretrain_tower, save_tower


def main() -> None:
    """Parses, trains, saves, prints a JSON line for each report."""
    defaults = PretrainingConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small/tower.safetensors"))
    parser.add_argument("--model", default="small-vision", help="preset whose tower to train")
    parser.add_argument("--patch-size", type=int, default=None, help="in place of the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--warmup-steps", type=int, default=defaults.warmup_steps)
    parser.add_argument("--workers", type=int, default=defaults.num_workers)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args()
    vision = get(args.model).vision
    if vision is None:
        raise SystemExit(f"preset {args.model!r} has no tower: choose a vision preset")
    if args.patch_size:
        vision = dataclasses.replace(vision, patch_size=args.patch_size)
    settings = PretrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        num_workers=args.workers,
        seed=args.seed,
    )
    torch.set_float32_matmul_precision("high")
    tower, last = pretrain_tower(
        vision, settings, device=args.device, report=lambda values: print(json.dumps(values), flush=True)
    )
    save_tower(tower, args.output, {**dataclasses.asdict(settings), **last})
    print(f"tower written to {args.output}")


if __name__ == "__main__":
    main()
