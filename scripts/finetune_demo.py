"""Teaches the package's small model something it cannot do: to describe a picture. SFT, then DPO.

    python scripts/finetune_demo.py                              # minutes on a CPU
    python scripts/finetune_demo.py --output benchmarks/results/finetune_demo.json

The small model answers questions with one word each, for a color or a shape; asked to describe a picture it fails. Here
it learns to say both ("teal triangle"): first from descriptions (as scripts/finetune.py, all weights, with a share of
easy-vqa's own questions, so that those are not forgotten); then from pairs of a right and a wrong description
(scripts/align.py's way, a LoRA adapter), wrong being what the first stage itself says where it errs, and one with
another color or shape where it does not. What pictures show follows from easy-vqa's questions and answers; what is
scored are test pictures, of which nothing was trained on. Prints a table and, last, one JSON line.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import phi35  # noqa: E402
from phi35.evaluation.batched import Question, answer  # noqa: E402
from phi35.evaluation.demo import evaluate  # noqa: E402
from phi35.training import environment  # noqa: E402
from phi35.training.build import SMALL_MODEL  # noqa: E402
from phi35.training.config import TrainingConfig  # noqa: E402
from phi35.training.description import commit, versions  # noqa: E402
from phi35.training.run import train  # noqa: E402
from vision.easy_vqa import COLORS, SHAPES, load_split  # noqa: E402
from vision.shard_writer import ShardWriter  # noqa: E402

QUESTION = "<|image_1|>\nDescribe the image."
ADAPTER = {"rank": 16, "alpha": 32}


def main() -> None:
    """Parse, train twice, score three times, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune_demo"), help="for data and runs")
    parser.add_argument("--pictures", type=int, default=2000, help="train pictures to learn from, half in each stage")
    parser.add_argument("--sft-steps", type=int, default=40)
    parser.add_argument("--dpo-steps", type=int, default=40)
    parser.add_argument("--test-pictures", type=int, default=500)
    parser.add_argument("--questions", type=int, default=50, help="of each kind that the small model knows already")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    started = time.monotonic()
    learned, tested = load_split("train"), load_split("test")
    known, shown = described(learned), described(tested)
    names = random.Random(0).sample(sorted(known), options.pictures)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    test_names = random.Random(1).sample(sorted(shown), options.test_pictures)
    wanted = {name: shown[name] for name in test_names}
    scores, seconds = {}, {}

    def stage(name: str, model: Any, processor: Any) -> None:
        scores[name] = score(model, processor, tested.image_paths, wanted, options.questions)
        print(f"{name}: {scores[name]}", flush=True)

    stage("before", *phi35.load(SMALL_MODEL, device="cpu", dtype="float32"))
    write_answers(options.folder / "answers", learned, {name: known[name] for name in first})
    shared: dict[str, Any] = {"dtype": "float32", "weight_decay": 0.0, "resume": False}
    sft = TrainingConfig(
        model=str(SMALL_MODEL),
        data=str(options.folder / "answers"),
        global_batch_size=32,
        max_steps=options.sft_steps,
        learning_rate=1e-3,
        warmup_steps=options.sft_steps // 10,
        output_dir=str(options.folder / "sft"),
        trackers=(),
        **shared,
    )
    seconds["sft"] = run(sft)
    model, processor = phi35.load(options.folder / "sft" / "model", device="cpu", dtype="float32")
    stage("after SFT", model, processor)
    right = {name: known[name] for name in second}
    num_wrong = write_pairs(options.folder / "pairs.jsonl", model, processor, learned.image_paths, right)
    dpo = TrainingConfig(
        model=str(options.folder / "sft" / "model"),
        data=str(options.folder / "pairs.jsonl"),
        adapter=ADAPTER,
        export_merged=True,
        preference={"loss": "sigmoid", "beta": 0.1},
        sequence_length=1024,
        global_batch_size=2,
        micro_batch_size=1,
        max_steps=options.dpo_steps,
        learning_rate=2e-4,
        warmup_steps=options.dpo_steps // 10,
        output_dir=str(options.folder / "dpo"),
        trackers=(),
        **shared,
    )
    seconds["dpo"] = run(dpo)
    stage("after DPO", *phi35.load(options.folder / "dpo" / "model", device="cpu", dtype="float32"))
    most = Counter(wanted.values()).most_common(1)[0][1]
    record = {
        "scores": scores,
        "majority": round(most / len(wanted), 4),
        "test_pictures": len(wanted),
        "pairs": {"count": len(second), "wrong_answers_of_its_own": num_wrong},
        "seconds": {**seconds, "all": round(time.monotonic() - started, 1)},
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name not in ("folder", "output")
        },
        "versions": versions(),
        "commit": commit(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "command": " ".join(["python", *sys.argv]),
    }
    print(table(record))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    environment.stop()


def described(split: Any) -> dict[int, str]:
    """Color and shape of each picture of which both are known."""
    return {
        name: f"{found.color} {found.shape}"
        for name, found in split.attributes.items()
        if found.color is not None and found.shape is not None
    }


def write_answers(folder: Path, split: Any, known: dict[int, str]) -> None:
    """Shards: each picture with its description, and every other one with a question of easy-vqa's own."""
    own: dict[int, list[Any]] = {}
    for question in split.questions:
        own.setdefault(question.images[0], []).append(question)
    draw = random.Random(2)
    with ShardWriter(folder) as writer:
        for number, (name, description) in enumerate(known.items()):
            asked = [(QUESTION, description)]
            if number % 2:
                other = draw.choice(own[name])
                asked.append((other.prompt, other.answer))
            picture = [("png", split.image_paths[name].read_bytes())]
            for index, (question, reply) in enumerate(asked):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                writer.write(f"picture-{name}-{index}", {"messages": turns}, picture)


def write_pairs(path: Path, model: Any, processor: Any, paths: dict[int, Path], known: dict[int, str]) -> int:
    """Right and wrong descriptions of pictures; returns how many of the wrong ones are the model's own."""
    given = ask(model, processor, paths, list(known))
    draw, num_wrong, lines = random.Random(3), 0, []
    for (name, right), said in zip(known.items(), given, strict=True):
        if said != right and said:
            num_wrong, wrong = num_wrong + 1, said
        else:
            wrong = draw.choice(others(right))
        prompt = [{"role": "user", "content": QUESTION}]
        images = [str(paths[name].resolve())]
        lines.append(json.dumps({"messages": prompt, "chosen": right, "rejected": wrong, "images": images}))
    path.write_text("\n".join(lines) + "\n")
    return num_wrong


def others(description: str) -> list[str]:
    """Descriptions that differ in one word."""
    color, shape = description.split()
    found = [f"{one} {shape}" for one in COLORS if one != color]
    return found + [f"{color} {one}" for one in SHAPES if one != shape]


def run(config: TrainingConfig) -> float:
    """Trains; returns the seconds that it took."""
    started = time.monotonic()
    train(config, device="cpu")
    return round(time.monotonic() - started, 1)


def ask(model: Any, processor: Any, paths: dict[int, Path], names: list[int]) -> list[str]:
    """The model's descriptions, greedily."""
    questions = [Question(QUESTION, (name,)) for name in names]
    given = answer(model, processor, questions, paths, batch_size=64)
    return [text.strip().lower() for text in given]


def score(
    model: Any, processor: Any, paths: dict[int, Path], wanted: dict[int, str], num_questions: int
) -> dict[str, float]:
    """Shares of right answers: the description, its color and its shape, and easy-vqa's test questions."""
    given = ask(model, processor, paths, list(wanted))
    parts = [(said.split(), right.split()) for said, right in zip(given, wanted.values(), strict=True)]
    colors = sum(said[:1] == right[:1] for said, right in parts)
    shapes = sum(said[1:] == right[1:] for said, right in parts)
    whole = sum(said == right for said, right in parts)
    asked = evaluate(model, processor, limit=num_questions, batch_size=64).single
    assert asked is not None
    count = len(wanted)
    return {
        "description": round(whole / count, 4),
        "color": round(colors / count, 4),
        "shape": round(shapes / count, 4),
        "easy-vqa": round(asked.accuracy, 4),
    }


def table(record: dict[str, Any]) -> str:
    """Accuracy in percent, a column for each stage."""
    stages = list(record["scores"])
    lines = [f"{'accuracy %':28s}" + "".join(f"{name:>12s}" for name in stages)]
    labels = {
        "description": f"description (most: {100 * record['majority']:.1f})",
        "color": "its color",
        "shape": "its shape",
        "easy-vqa": "easy-vqa's own questions",
    }
    for key, label in labels.items():
        lines.append(f"{label:28s}" + "".join(f"{100 * record['scores'][name][key]:12.1f}" for name in stages))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
