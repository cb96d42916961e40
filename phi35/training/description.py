"""The record of a training run: its resolved config, versions, commit and command."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from phi35.training.config import TrainingConfig
from phi35.training.environment import Environment


def describe_run(folder: Path, config: TrainingConfig, place: Environment) -> None:
    """Prints the resolved config and keeps it beside the run, with versions, commit and command."""
    import yaml

    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    accumulation = config.gradient_accumulation_steps(place.world_size)
    print(f"training config ({place.world_size} x {place.device.type}, {accumulation} micro-batches a step):")
    print("".join(f"  {line}\n" for line in text.splitlines()), end="", flush=True)
    (folder / "training_config.yaml").write_text(text)
    described = {
        "versions": versions(),
        "commit": commit(),
        "seed": config.seed,
        "command": sys.argv,
        "world_size": place.world_size,
        "device": torch.cuda.get_device_name(place.device)
        if place.device.type == "cuda"
        else platform.processor() or platform.machine(),
    }
    print("".join(f"  {name}: {described[name]}\n" for name in ("versions", "commit")), end="", flush=True)
    (folder / "run.json").write_text(json.dumps(described, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    import deepspeed

    import phi35

    return {
        "phi35": phi35.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": str(deepspeed.__version__),
    }


def commit() -> str | None:
    """Commit of the source tree, with "+changes" where files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None
