"""Teaches the package's small model what it cannot do, by SFT and then by preferences that SFT's data do not hold.

    python scripts/finetune_demo.py                              # minutes on a CPU
    python scripts/finetune_demo.py --seeds 0 1 2 --output benchmarks/results/finetune_demo.json

The small model answers questions with one word each; asked to describe a picture it fails. What is wanted is its color
and shape in two words ("teal triangle"). But of the descriptions at hand only a third are written so, the others say
"a triangle that is teal":

1. SFT (as scripts/finetune.py, all weights, with a share of easy-vqa's own questions, so that those are not forgotten)
   learns what to say, and mostly to say it at length. With --control as many steps more on the same data follow.
2. DPO (as scripts/align.py, a LoRA adapter) on pairs of the model's own answers, drawn for training pictures that SFT
   has not seen: one that is right and short, and one that is wrong or long. No description is given to it.

What pictures show follows from easy-vqa's questions and answers. Scored are test pictures, of which nothing was trained
on and nothing drawn. Prints a table and, last, one JSON line.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean
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
from vision.easy_vqa import load_split  # noqa: E402
from vision.shard_writer import ShardWriter  # noqa: E402

QUESTION = "<|image_1|>\nDescribe the image."
SHORT = 1 / 3  # of the descriptions to learn from
ADAPTER = {"rank": 16, "alpha": 32}
COLUMNS = {
    "wanted": "right, in two words",
    "right": "right, in either form",
    "short": "in two words",
    "easy-vqa": "easy-vqa's own questions",
}


def main() -> None:
    """Parse, train and score once for each seed, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune_demo"), help="for data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of pictures, order, forms and draws")
    parser.add_argument("--pictures", type=int, default=1600, help="train pictures to learn from, half in each stage")
    parser.add_argument("--draws", type=int, default=3, help="answers of its own for each picture of the second half")
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--dpo-steps", type=int, default=24)
    parser.add_argument("--dpo-rate", type=float, default=5e-4)
    parser.add_argument("--test-pictures", type=int, default=500)
    parser.add_argument("--questions", type=int, default=50, help="of each kind that the small model knows already")
    parser.add_argument("--control", action="store_true", help="another run of SFT after the first, too")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    options = parser.parse_args()
    started = time.monotonic()
    runs = [one_run(options, seed) for seed in options.seeds]
    record = {
        "scores": {
            stage: {key: [run["scores"][stage][key] for run in runs] for key in COLUMNS} for stage in runs[0]["scores"]
        },
        "majority": round(mean(run["majority"] for run in runs), 4),
        "test_pictures": options.test_pictures,
        "pairs": [run["pairs"] for run in runs],
        "seconds": {**{key: [run["seconds"][key] for run in runs] for key in runs[0]["seconds"]}},
        "settings": {key: value for key, value in vars(options).items() if key not in ("folder", "output")},
        "versions": versions(),
        "commit": commit(),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "command": " ".join(["python", *sys.argv]),
    }
    record["seconds"]["everything"] = round(time.monotonic() - started, 1)
    print(table(record))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    environment.stop()


def one_run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores before, after SFT, after as much of it again and after DPO; counts and seconds."""
    folder = options.folder / f"seed-{seed}"
    learned, tested = load_split("train"), load_split("test")
    known, shown = described(learned), described(tested)
    names = random.Random(seed).sample(sorted(known), options.pictures)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    wanted = {name: shown[name] for name in random.Random(seed + 1).sample(sorted(shown), options.test_pictures)}
    scores, seconds = {}, {}

    def stage(name: str, model: Any, processor: Any) -> None:
        scores[name] = score(model, processor, tested.image_paths, wanted, options.questions)
        print(f"seed {seed}, {name}: {scores[name]}", flush=True)

    stage("before", *phi35.load(SMALL_MODEL, device="cpu", dtype="float32"))
    write_answers(folder / "answers", learned, {name: known[name] for name in first}, seed)
    seconds["sft"] = run(sft_config(options, SMALL_MODEL, folder, "sft", seed))
    model, processor = phi35.load(folder / "sft" / "model", device="cpu", dtype="float32")
    stage("SFT", model, processor)
    if options.control:
        seconds["sft again"] = run(sft_config(options, folder / "sft" / "model", folder, "again", seed))
        stage("SFT twice", *phi35.load(folder / "again" / "model", device="cpu", dtype="float32"))
    started = time.monotonic()
    judged = {name: known[name] for name in second}
    counts = write_pairs(folder / "pairs.jsonl", model, processor, learned.image_paths, judged, options.draws, seed)
    seconds["draws"] = round(time.monotonic() - started, 1)
    seconds["dpo"] = run(dpo_config(options, folder, seed))
    stage("SFT, DPO", *phi35.load(folder / "dpo" / "model", device="cpu", dtype="float32"))
    most = Counter(wanted.values()).most_common(1)[0][1]
    return {"scores": scores, "seconds": seconds, "pairs": counts, "majority": most / len(wanted)}


def sft_config(options: argparse.Namespace, model: Path, folder: Path, name: str, seed: int) -> TrainingConfig:
    """Training of all weights on the descriptions at hand."""
    return TrainingConfig(
        model=str(model),
        data=str(folder / "answers"),
        global_batch_size=16,
        max_steps=options.sft_steps,
        learning_rate=1e-3,
        warmup_steps=options.sft_steps // 10,
        output_dir=str(folder / name),
        **shared(seed),
    )


def dpo_config(options: argparse.Namespace, folder: Path, seed: int) -> TrainingConfig:
    """Training of an adapter on the pairs."""
    return TrainingConfig(
        model=str(folder / "sft" / "model"),
        data=str(folder / "pairs.jsonl"),
        adapter=ADAPTER,
        export_merged=True,
        preference={"loss": "sigmoid", "beta": 0.5},
        sequence_length=1024,
        global_batch_size=2,
        micro_batch_size=1,
        max_steps=options.dpo_steps,
        learning_rate=options.dpo_rate,
        warmup_steps=options.dpo_steps // 10,
        output_dir=str(folder / "dpo"),
        **shared(seed),
    )


def shared(seed: int) -> dict[str, Any]:
    return {"dtype": "float32", "weight_decay": 0.0, "resume": False, "seed": seed, "trackers": ()}


def described(split: Any) -> dict[int, str]:
    """Color and shape of each picture of which both are known."""
    return {
        name: f"{found.color} {found.shape}"
        for name, found in split.attributes.items()
        if found.color is not None and found.shape is not None
    }


def in_long(description: str) -> str:
    """The long form of "color shape"."""
    color, shape = description.split()
    return f"a {shape} that is {color}"


def write_answers(folder: Path, split: Any, known: dict[int, str], seed: int) -> None:
    """Shards: each picture with a description, short or long, and every other one with a question of easy-vqa's own."""
    own: dict[int, list[Any]] = {}
    for question in split.questions:
        own.setdefault(question.images[0], []).append(question)
    draw = random.Random(seed + 2)
    with ShardWriter(folder) as writer:
        for number, (name, description) in enumerate(known.items()):
            asked = [(QUESTION, description if draw.random() < SHORT else in_long(description))]
            if number % 2:
                other = draw.choice(own[name])
                asked.append((other.prompt, other.answer))
            picture = [("png", split.image_paths[name].read_bytes())]
            for index, (question, reply) in enumerate(asked):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                writer.write(f"picture-{name}-{index}", {"messages": turns}, picture)


def write_pairs(
    path: Path, model: Any, processor: Any, paths: dict[int, Path], known: dict[int, str], draws: int, seed: int
) -> dict[str, int]:
    """Pairs of answers that the model itself gives; returns how many, and what their rejected ones are."""
    names = [name for name in known for _ in range(draws)]
    given = ask(model, processor, paths, names, temperature=1.0, seed=seed)
    lines, counts = [], Counter(pictures=len(known))
    for number, (name, right) in enumerate(known.items()):
        said = given[number * draws : (number + 1) * draws]
        rejected = sorted({one for one in said if one and one != right}, key=said.index)
        # The first, so that long and wrong ones come as often as the model says them.
        if right in said and rejected:
            counts["long" if rejected[0] == in_long(right) else "wrong"] += 1
            prompt = [{"role": "user", "content": QUESTION}]
            pair = {"chosen": right, "rejected": rejected[0], "images": [str(paths[name].resolve())]}
            lines.append(json.dumps({"messages": prompt, **pair}))
    path.write_text("\n".join(lines) + "\n")
    return {**counts, "pairs": len(lines)}


def run(config: TrainingConfig) -> float:
    """Trains; returns the seconds that it took."""
    started = time.monotonic()
    train(config, device="cpu")
    return round(time.monotonic() - started, 1)


def ask(
    model: Any, processor: Any, paths: dict[int, Path], names: list[int], temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """The model's descriptions."""
    questions = [Question(QUESTION, (name,)) for name in names]
    given = answer(model, processor, questions, paths, batch_size=64, temperature=temperature, seed=seed)
    return [text.strip().lower() for text in given]


def score(
    model: Any, processor: Any, paths: dict[int, Path], wanted: dict[int, str], num_questions: int
) -> dict[str, float]:
    """Shares of answers that are as wanted, right in either form, and short; and of right ones to easy-vqa's own."""
    given = ask(model, processor, paths, list(wanted))
    asked = evaluate(model, processor, limit=num_questions, batch_size=64).single
    assert asked is not None
    return {**shares(given, list(wanted.values())), "easy-vqa": round(asked.accuracy, 4)}


def shares(given: list[str], wanted: list[str]) -> dict[str, float]:
    """Of descriptions: as wanted, right in either form, in two words."""
    pairs = list(zip(given, wanted, strict=True))
    found = {
        "wanted": sum(said == right for said, right in pairs),
        "right": sum(said in (right, in_long(right)) for said, right in pairs),
        "short": sum(len(said.split()) == 2 for said in given),
    }
    return {key: round(count / len(wanted), 4) for key, count in found.items()}


def table(record: dict[str, Any]) -> str:
    """Percent, a column for each stage; means over the seeds, and the least and the most of several."""
    stages = list(record["scores"])
    lines = [f"{'% of test pictures':36s}" + "".join(f"{name:>20s}" for name in stages)]
    for key, label in COLUMNS.items():
        if key == "wanted":
            label += f" (most: {100 * record['majority']:.1f})"
        cells = [percent(record["scores"][name][key]) for name in stages]
        lines.append(f"{label:36s}" + "".join(f"{cell:>20s}" for cell in cells))
    return "\n".join(lines)


def percent(values: list[float]) -> str:
    """The mean, with least and most where there are several."""
    text = f"{100 * mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({100 * min(values):.1f}-{100 * max(values):.1f})"


if __name__ == "__main__":
    main()
