"""The recipe of the small model in the package, in one command: data, tower, training, export, scores, card.

    python scripts/train_small_model.py --output runs/small --workers 12 --minutes 5 --install

Stages whose outputs exist are not repeated, so that an interrupted run goes on where it stopped. ``--minutes``
measures the speed first and chooses the number of steps; ``--steps`` states it. ``--install`` copies the finished
model into the package.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ROOT / "phi35" / "small_model"
CALIBRATION_STEPS = 120
MAX_MEGABYTES = 12.0


def main() -> None:
    """Runs all stages."""
    args = parse()
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    times = Stopwatch(folder / "seconds.json")
    shards, tower, run, model = folder / "shards", folder / "tower.safetensors", folder / "run", folder / "model"
    if not any(shards.glob("*.tar")):
        with times.stage("data"):
            call("scripts/prepare_easy_vqa.py", "--output", shards, "--pairs", args.pairs, "--draws", args.draws)
    if not args.no_tower and not tower.exists():
        with times.stage("tower"):
            call_tower(args, tower)
    if not (run / "model" / "model.safetensors").exists():
        settings = training_settings(args, shards, None if args.no_tower else tower)
        steps = args.steps or calibrated_steps(args, settings, folder / "calibration", times)
        with times.stage("training"):
            train({**settings, "max_steps": steps, "warmup_steps": min(400, steps // 20 + 1)}, run, args.device)
    with times.stage("evaluation"):
        scores = finish(run, model, args.device, args.eval_limit)
    write_card(model, run, scores, times, args.commit)
    size = sum(path.stat().st_size for path in model.iterdir()) / 1e6
    print(f"{model}: {size:.2f} MB, {json.dumps(scores)}")
    if size > MAX_MEGABYTES:
        raise SystemExit(f"the model folder takes {size:.1f} MB, more than {MAX_MEGABYTES} MB")
    if args.install:
        for path in sorted(model.iterdir()):
            shutil.copy(path, PACKAGED / path.name)
        print(f"installed into {PACKAGED}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small"))
    parser.add_argument("--model", default="small-vision", help="preset, or folder of a model to go on from")
    parser.add_argument("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--workers", type=int, default=max(0, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, where --steps is not given")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tower-learning-rate", type=float, default=3e-4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--pairs", type=int, default=24000, help="two-image samples")
    parser.add_argument("--draws", type=int, default=6, help="visits of a single picture in an epoch")
    parser.add_argument("--tower-steps", type=int, default=5000)
    parser.add_argument("--patch-size", type=int, default=None, help="of the tower, in place of the preset's")
    parser.add_argument("--freeze", nargs="*", default=[], help="parts that are not trained, e.g. tower")
    parser.add_argument("--no-tower", action="store_true", help="leave out the tower's own supervision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-limit", type=int, default=None, help="most questions of each kind; by default all")
    parser.add_argument("--commit", default=None, help="named in the card where the machine has no git history")
    parser.add_argument("--install", action="store_true", help="copy the model into the package")
    args = parser.parse_args()
    if args.steps is None and args.minutes <= 0:
        raise SystemExit(f"--minutes must be positive, got {args.minutes}")
    if (args.model != "small-vision" or Path(args.model).is_dir()) and not args.no_tower:
        raise SystemExit("a model to go on from has its tower already: add --no-tower")
    return args


class Stopwatch:
    """Seconds of each stage, kept over interrupted runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self._name, self._started = "", 0.0

    def stage(self, name: str) -> "Stopwatch":
        """Measures a with-block under a name."""
        self._name = name
        return self

    def __enter__(self) -> None:
        print(f"== {self._name}", flush=True)
        self._started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.monotonic() - self._started
        self.path.write_text(json.dumps(self.seconds))
        print(f"== {self._name}: {self.seconds[self._name]:.1f} s", flush=True)


def call(script: str, *arguments: object) -> None:
    """Runs a script of this repository in a process of its own.

    Raises:
        SystemExit: if it fails.
    """
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    # Such a small float32 model gains from TF32 products, and its steps are short: one thread launches them.
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    print("$", shlex.join(command), flush=True)
    status = subprocess.run(command, env=environment).returncode
    if status:
        raise SystemExit(f"{script} failed with status {status}")


def call_tower(args: argparse.Namespace, tower: Path) -> None:
    """Supervises the tower."""
    options: list[object] = ["--output", tower, "--steps", args.tower_steps, "--workers", args.workers]
    options += ["--model", args.model, "--seed", args.seed]
    if args.device:
        options += ["--device", args.device]
    if args.patch_size:
        options += ["--patch-size", args.patch_size]
    call("scripts/pretrain_tower.py", *options)


def training_settings(args: argparse.Namespace, shards: Path, tower: Path | None) -> dict[str, Any]:
    """Fields of the training config."""
    return {
        "model": args.model,
        "model_overrides": {"vision": {"patch_size": args.patch_size}} if args.patch_size else {},
        "tower": None if tower is None else str(tower),
        "freeze": args.freeze,
        "data": str(shards),
        "data_options": {"augmentation": True, "cache_decoded": True},
        "num_workers": args.workers,
        "global_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "learning_rates": {"tower": args.tower_learning_rate},
        "schedule": "cosine",
        "min_lr_ratio": 0.01,
        "weight_decay": 0.05,
        "adam_betas": [0.9, 0.98],
        "dtype": args.dtype,
        "zero_stage": 0 if args.dtype == "float32" else 1,
        "log_interval": 50,
        "seed": args.seed,
    }


def train(settings: dict[str, Any], output: Path, device: str | None) -> None:
    """One run of scripts/train_vision.py; goes on from its newest checkpoint."""
    import yaml

    output.mkdir(parents=True, exist_ok=True)
    steps = settings["max_steps"]
    path = output / "recipe.yaml"
    settings = {**settings, "output_dir": str(output), "save_interval": max(1000, steps // 4), "keep_last": 1}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    call("scripts/train_vision.py", "--config", path, *(["--device", device] if device else []))


def calibrated_steps(args: argparse.Namespace, settings: dict[str, Any], folder: Path, times: Stopwatch) -> int:
    """Steps that fit into ``--minutes`` at the speed of a short run."""
    with times.stage("calibration"):
        train({**settings, "max_steps": CALIBRATION_STEPS, "log_interval": 10, "export": False}, folder, args.device)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    later = sorted(line["seconds"] for line in lines[len(lines) // 2 :])
    seconds = later[len(later) // 2]
    steps = max(CALIBRATION_STEPS, int(args.minutes * 60 / seconds))
    print(f"{seconds * 1000:.1f} ms a step ({args.batch_size / seconds:,.0f} samples/s): {steps} steps", flush=True)
    return steps


def finish(run: Path, model: Path, device: str | None, limit: int | None) -> dict[str, Any]:
    """Writes the bfloat16 model folder and scores what it holds, loaded as float32."""
    from tqdm import tqdm

    import phi35
    from phi35.cli.table import render
    from phi35.evaluation.demo import evaluate, table

    loaded, processor = phi35.load(run / "model", device="cpu", dtype="bfloat16")
    phi35.save(loaded, processor, model)
    loaded, processor = phi35.load(model, device=device, dtype="float32")
    with tqdm(unit=" questions", mininterval=5) as bar:
        result = evaluate(loaded, processor, limit=limit, progress=lambda done, total: bar.update(done - bar.n))
    print(render(table(result)))
    for mistake in result.mistakes[:20]:
        print(json.dumps(mistake))
    scores = {"table": render(table(result)), **result.to_dict()}
    (model.parent / "scores.json").write_text(json.dumps(scores, indent=1))
    return {name: value for name, value in scores.items() if name != "table"}


def write_card(model: Path, run: Path, scores: dict[str, Any], times: Stopwatch, revision: str | None) -> None:
    """The model's README.md: data, command, time, scores."""
    import torch

    from phi35.loading import load_config
    from phi35.training.description import commit

    config = load_config(model)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    shown = json.loads((model.parent / "scores.json").read_text())["table"]
    steps = sum(1 for _ in (run / "metrics.jsonl").open())
    text = CARD.format(
        parameters=_count_parameters(model),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        tower_hidden=config.vision.hidden_size if config.vision else 0,
        tower_layers=config.vision.num_hidden_layers if config.vision else 0,
        patch=config.vision.patch_size if config.vision else 0,
        command=shlex.join(["python", "scripts/train_small_model.py", *sys.argv[1:]]),
        commit=revision or commit() or "unknown",
        device=device,
        torch=torch.__version__,
        steps=steps,
        seconds="\n".join(f"- {name}: {value:.0f} s" for name, value in times.seconds.items()),
        table=shown,
        recipe=(run / "recipe.yaml").read_text().replace(str(run.parent), "runs/small"),
        scores=json.dumps(scores),
    )
    (model / "README.md").write_text(text)


def _count_parameters(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


CARD = """# The small vision model of this package

A Phi-3.5-vision in miniature ({parameters:,} parameters): decoder of width {hidden} with {layers} layers, CLIP tower
of width {tower_hidden} with {tower_layers} blocks on {patch}-pixel patches of 64-pixel crops, a tokenizer of 1,000
base tokens with the family's special tokens. It answers short English questions about one or two pictures of a
single coloured shape, and nothing else: it shows that the package works, and serves its tests.

## Data
easy-vqa (MIT licence): its 4,000 train pictures, their questions, and two-image questions built from pairs of train
pictures (`vision/easy_vqa.py`, `vision/easy_vqa_shards.py`). Nothing of the test split. The tower was first taught
the colours and shapes that the train answers state (`vision/pretraining.py`).

## Training
`{command}`

Commit {commit}, {device}, torch {torch}, {steps} steps.
{seconds}

```yaml
{recipe}```

## Scores
Greedy answers to the 9,673 test questions and to 2,100 two-image questions built from test pictures; beside them what
an answerer that sees no picture can reach at most (`phi35 eval demo` prints this table again).

```
{table}
```

`{scores}`
"""

if __name__ == "__main__":
    main()
