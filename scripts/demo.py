"""The whole framework once, on real data and a CPU: answer, train two models, answer with what was trained.

python scripts/demo.py [--output runs/demo]      (``make demo`` installs and calls it)
"""

import argparse
import socket
import subprocess
import sys
import time
from pathlib import Path

import phi35
from vision.easy_vqa import load_split

SCRIPTS = Path(__file__).resolve().parent


def main() -> int:
    """Runs every part and lists what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of everything that is written")
    output = parser.parse_args().output
    started = time.perf_counter()
    correct = answer_about_two_pictures()
    moe = train("MoE, two processes, expert parallel size 2", output / "moe", "train_moe.py", launcher=True)
    vision = train("vision, one process", output / "vision", "train_vision.py", launcher=False)
    headline("generate from what was just trained (a minute of training: fluent nonsense is expected)")
    code = phi35.generate("def main(", model=str(moe / "model"), max_new_tokens=40)
    print(f"MoE:    'def main(' -> {code!r}")
    question, picture = "what shape is in the image?", test_pictures()[0]
    answer = phi35.generate(question, images=[picture], model=str(vision / "model"), max_new_tokens=8)
    print(f"vision: {picture.name}: {question} -> {answer!r}")
    headline(f"done in {time.perf_counter() - started:.0f} s")
    for folder in (moe, vision):
        for path in ("curves.png", "metrics.jsonl", "training_config.yaml", "checkpoints", "model"):
            print(f"  {folder / path}")
    return 0 if correct else 1


def answer_about_two_pictures() -> bool:
    """The small model in the package answers questions whose answers are known."""
    headline("phi35.generate with the small model inside the package")
    first, second = test_pictures()
    facts = load_split("test").attributes
    shown = [facts[int(path.stem)] for path in (first, second)]
    print(f"image 1: {first.name} (a {shown[0].color} {shown[0].shape})")
    print(f"image 2: {second.name} (a {shown[1].color} {shown[1].shape})")
    questions = {
        f"which image shows a {shown[1].color} {shown[1].shape}?": "second",
        f"which image shows a {shown[0].shape}?": "first",
        "do both images show the same shape?": "yes" if shown[0].shape == shown[1].shape else "no",
        "what color is the shape in the first image?": shown[0].color,
    }
    right = 0
    for question, expected in questions.items():
        answer = phi35.generate(prompt=question, images=[first, second])
        right += answer == expected
        print(f"  {question:52} {answer:8} {'correct' if answer == expected else f'WRONG, expected {expected}'}")
    return right == len(questions)


def test_pictures() -> tuple[Path, Path]:
    """Two pictures of the test split that differ in colour and shape."""
    split = load_split("test")
    known = [index for index, facts in sorted(split.attributes.items()) if facts.color and facts.shape]
    first = split.attributes[known[0]]
    for index in known[1:]:
        facts = split.attributes[index]
        if facts.color != first.color and facts.shape != first.shape:
            return split.image_paths[known[0]], split.image_paths[index]
    raise ValueError("the test split shows one colour or one shape only: reinstall easy-vqa")


def train(title: str, folder: Path, script: str, launcher: bool) -> Path:
    """Runs a training script as a user would and returns its output folder."""
    headline(f"train: {title}")
    start = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())] if launcher else [sys.executable]
    command = [*start, str(SCRIPTS / script), f"output_dir={folder}", "resume=false"]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return folder


def free_port() -> int:
    """A port nobody listens on, so that two launchers on one machine do not meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def headline(text: str) -> None:
    """One line that separates the parts."""
    print(f"\n=== {text} ===", flush=True)


if __name__ == "__main__":
    sys.exit(main())
