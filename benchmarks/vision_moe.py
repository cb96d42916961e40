"""A sparse vision model beside a dense one of as many active parameters, trained alike on easy-vqa.

    python benchmarks/vision_moe.py --output runs/vision_moe            # a GPU, some minutes
    python benchmarks/vision_moe.py --output runs/vision_moe --upcycle --steps 300 --batch-size 32 --dtype float32 \
        --learning-rate 3e-4 --router-std 0.002                         # on a CPU, ten minutes
    python benchmarks/vision_moe.py --output runs/vision_moe --smoke    # shows that it runs

Both decoders and projectors start from random weights and see the same samples in the same order; both have the image
tower of the package's small model, frozen, so that the decoder alone decides. The sparse one ("small-vision-moe", 8
experts, 2 a token) has fewer active parameters than the dense one ("small-vision"). With ``--upcycle`` both go on
from the package's trained model instead: the dense one as it is, the sparse one with 8 copies of each feed-forward, of
which a token passes one, so that its router alone is added to the active parameters. Both train at once. Scored on
easy-vqa's 9,673 test questions about one picture, greedily. Then the sparse model's experts are counted for image
tokens and for text tokens, layer by layer. Prints tables and, last, one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402

import phi35  # noqa: E402
from moe.token_kinds import KindCounts, count_by_kind, plot_by_kind  # noqa: E402
from moe.upcycling import UpcyclingOptions, upcycle  # noqa: E402
from phi35.cli.table import render  # noqa: E402
from phi35.evaluation.batched import Question, answer  # noqa: E402
from phi35.evaluation.demo import summarise  # noqa: E402
from phi35.parameter_count import count_parameters  # noqa: E402
from phi35.registry import resolve  # noqa: E402
from phi35.training.build import SMALL_MODEL  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {"dense": "small-vision", "sparse": "small-vision-moe"}
SETTINGS = "steps batch_size learning_rate aux dtype upcycle router_std normalise".split()
TOWER = "model.vision_embed_tokens.img_processor."


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of data, runs, models and results.json")
    parser.add_argument("--plot", type=Path, help="picture of the experts; by default experts.png in the output folder")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--aux", type=float, default=0.01, help="weight of the load-balance loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a pair of runs for each")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--backend", default="auto", help="of the sparse model's experts")
    parser.add_argument("--workers", type=int, help="data workers of each run; by default half of the cores")
    parser.add_argument("--eval-limit", type=int, help="most questions of each kind; by default all")
    parser.add_argument("--upcycle", action="store_true", help="go on from the package's model")
    parser.add_argument("--router-std", type=float, default=0.02, help="of the upcycled model's routers")
    parser.add_argument("--normalise", action="store_true", help="the upcycled model's weights sum to one")
    parser.add_argument("--smoke", action="store_true", help="a few steps and questions")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.smoke:
        arguments.steps, arguments.batch_size, arguments.eval_limit = 12, 8, 8
    if arguments.workers is None:
        arguments.workers = 0 if arguments.smoke else max(1, min(7, (os.cpu_count() or 2) // 2 - 1))
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/vision_moe.py", *sys.argv[1:]])
    record["settings"] = {name: getattr(arguments, name) for name in SETTINGS}
    shards = prepare(arguments.output, arguments.smoke)
    record["runs"] = [row for seed in arguments.seeds for row in train_pair(arguments, shards, seed, device)]
    print(render([shown(row) for row in record["runs"]]), flush=True)
    sparse = arguments.output / f"sparse-{arguments.seeds[0]}" / "model"
    record["experts"] = experts(sparse, arguments, device)
    text = json.dumps(record, indent=1)
    (arguments.output / "results.json").write_text(text + "\n")
    print(json.dumps(record))


def prepare(output: Path, smoke: bool) -> Path:
    """The shards of single pictures with their questions; made once."""
    shards = output / "shards"
    if not any(shards.glob("*.tar")):
        options = ["--pairs", "8" if smoke else "0", "--draws", "10"]
        call([sys.executable, ROOT / "scripts/prepare_easy_vqa.py", "--output", shards, *options])
    return shards


def start_folder(arguments: argparse.Namespace, kind: str, folder: Path, seed: int) -> Path:
    """A model to start from: random, but for the small model's tower; or the small model, upcycled for the sparse."""
    if arguments.upcycle:
        options = UpcyclingOptions(
            num_experts=8, top_k=1, norm_topk_prob=arguments.normalise, router_std=arguments.router_std, seed=seed
        )
        if kind == "sparse":
            upcycle(SMALL_MODEL, folder, options)
        else:
            phi35.save(*phi35.load(SMALL_MODEL, device="cpu", dtype="float32"), folder)
        return folder
    model = phi35.create(PRESETS[kind], seed=seed, device="cpu", dtype="float32")
    taught, processor = phi35.load(SMALL_MODEL, device="cpu", dtype="float32")
    state = {name: tensor for name, tensor in taught.state_dict().items() if name.startswith(TOWER)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not any(name.startswith(TOWER) for name in missing)
    phi35.save(model, processor, folder)
    return folder


def train_pair(arguments: argparse.Namespace, shards: Path, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """Dense and sparse run of one seed, at once; then their scores."""
    began, running = time.monotonic(), {}
    for kind in PRESETS:
        run = arguments.output / f"{kind}-{seed}"
        if (run / "model" / "model.safetensors").exists():
            continue
        run.mkdir(parents=True, exist_ok=True)
        path = run / "recipe.yaml"
        settings = recipe(arguments, kind, start_folder(arguments, kind, run / "start", seed), shards, run, seed)
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        command = [sys.executable, str(ROOT / "scripts/train_vision.py"), "--config", str(path)]
        log = (run / "train.log").open("w")
        running[kind] = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    for kind, process in running.items():
        if process.wait():
            raise SystemExit((arguments.output / f"{kind}-{seed}" / "train.log").read_text()[-3000:])
    print(f"seed {seed}: trained in {time.monotonic() - began:.0f} s", flush=True)
    return [score(arguments, kind, seed, device) for kind in PRESETS]


def recipe(arguments: argparse.Namespace, kind: str, model: Path, shards: Path, run: Path, seed: int) -> dict[str, Any]:
    """Fields of the training config, the same for both but for the model."""
    return {
        "model": str(model),
        "model_overrides": {"experts_backend": arguments.backend} if kind == "sparse" else {},
        "data": str(shards),
        "data_options": {"augmentation": True, "cache_decoded": True},
        "num_workers": arguments.workers,
        "freeze": ["tower"],
        "global_batch_size": arguments.batch_size,
        "max_steps": arguments.steps,
        "warmup_steps": max(1, arguments.steps // 20),
        "learning_rate": arguments.learning_rate,
        "schedule": "cosine",
        "min_lr_ratio": 0.01,
        "weight_decay": 0.05,
        "adam_betas": [0.9, 0.98],
        "dtype": arguments.dtype,
        "zero_stage": 0 if arguments.dtype == "float32" else 1,
        **({"router_aux_loss_coef": arguments.aux} if kind == "sparse" else {}),
        "log_interval": 50,
        "save_interval": 10**9,
        "seed": seed,
        "output_dir": str(run),
    }


def score(arguments: argparse.Namespace, kind: str, seed: int, device: torch.device) -> dict[str, Any]:
    """Accuracy of one model on the test questions, and its size."""
    run = arguments.output / f"{kind}-{seed}"
    model, processor = phi35.load(run / "model", device=device, dtype="float32")
    split, questions = test_questions(arguments.eval_limit)
    asked = [Question(question.prompt, question.images) for question in questions]
    began = time.monotonic()
    result = summarise(questions, answer(model, processor, asked, split.image_paths), time.monotonic() - began)
    count = count_parameters(model.config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = {one.kind: one.accuracy for one in result.scores if one.images == 1}
    assert result.single is not None
    return {
        "model": kind,
        "seed": seed,
        "parameters": count.total,
        "active": count.active,
        "accuracy": result.single.accuracy,
        "questions": result.single.count,
        **kinds,
        "loss": lines[-1]["loss"],
        "ms_per_step": 1e3 * sorted(line["seconds"] for line in lines)[len(lines) // 2],
    }


def test_questions(limit: int | None) -> tuple[Any, list[Any]]:
    """easy-vqa's test split and its questions about one picture, at most so many of each kind, evenly spread."""
    split, questions = resolve("vision.easy_vqa:evaluation_questions")()
    single = [question for question in questions if len(question.images) == 1]
    if limit is None:
        return split, single
    chosen = []
    for kind in dict.fromkeys(question.kind for question in single):
        same = [question for question in single if question.kind == kind]
        count = min(limit, len(same))
        chosen += [same[place * len(same) // count] for place in range(count)]
    return split, chosen


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    percent = {name: f"{100 * row[name]:.2f}" for name in ("accuracy", "shape", "color", "yes/no") if name in row}
    counts = {name: f"{row[name]:,}" for name in ("parameters", "active", "questions")}
    rest = {"loss": f"{row['loss']:.4f}", "ms/step": f"{row['ms_per_step']:.1f}"}
    return {"model": row["model"], "seed": row["seed"], **counts, **{f"{k} %": v for k, v in percent.items()}, **rest}


@torch.inference_mode()
def experts(folder: Path, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Shares of the experts among image tokens and text tokens of test questions, layer by layer."""
    model, processor = phi35.load(folder, device=device, dtype="float32")
    split, questions = test_questions(min(arguments.eval_limit or 700, 700))
    chosen = questions
    total: KindCounts | None = None
    for first in range(0, len(chosen), 64):
        part = chosen[first : first + 64]
        prompts = [processor.apply_chat_template([{"role": "user", "content": one.prompt}]) for one in part]
        pictures = [[split.image_paths[key] for key in one.images] for one in part]
        batch = {name: tensor.to(device) for name, tensor in processor(prompts, images=pictures).items()}
        output = model(**batch, logits_to_keep=1)
        counts = count_by_kind(output.router_outputs, batch["input_ids"], batch["attention_mask"])
        total = counts if total is None else total + counts
    assert total is not None
    plot = arguments.plot or arguments.output / "experts.png"
    plot_by_kind(total, plot, "easy-vqa's test questions: % of a layer's choices")
    image, text = total.shares()
    separation = total.separation()
    rows = [
        {
            "layer": layer,
            "image: busiest": f"{int(image[layer].argmax())} ({100 * float(image[layer].max()):.0f} %)",
            "text: busiest": f"{int(text[layer].argmax())} ({100 * float(text[layer].max()):.0f} %)",
            "distance": f"{float(separation[layer]):.3f}",
        }
        for layer in range(len(image))
    ]
    print(render(rows), flush=True)
    return {"image": image.tolist(), "text": text.tolist(), "distance": separation.tolist(), "questions": len(chosen)}


def environment() -> dict[str, str]:
    """Of a training process: one thread launches its short steps."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}


def call(command: list[Any]) -> None:
    """Run a script of the repository.

    Raises:
        SystemExit: if it fails.
    """
    status = subprocess.run([str(part) for part in command], env=environment()).returncode
    if status:
        raise SystemExit(f"{command[1]} failed with status {status}")


if __name__ == "__main__":
    main()
