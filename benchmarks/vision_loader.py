"""What a vision loader delivers and what a GPU takes: pictures a second and core, cores for a busy device.

    python benchmarks/vision_loader.py                              # this machine's cores, one minute, no GPU
    python benchmarks/vision_loader.py --make shards                # only write the shards, to carry them elsewhere
    python benchmarks/vision_loader.py --shards shards --train      # train phi-3.5-vision from shards on one GPU

The pictures are real photographs as JPEG: those of scikit-image's ``skimage.data`` by default, two in a sample, at
several sizes. The need is that of phi-3.5-vision under full training at num_crops 4 and a given MFU on one H200. The
consumer takes a batch, is busy for as long as the device would be (asleep, so that it costs the readers no core), and
counts how long it waits for the next. ``--train`` times the same steps on batches that lie on the device and on batches
from the shards: the quotient is the part of the time that the device is busy.
Prints tables and, last, one JSON line.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from phi35 import presets  # noqa: E402
from phi35.tokenizer import Tokenizer  # noqa: E402
from phi35.training.flops import PEAK_FLOPS, TrainingFlops, Work, batch_work  # noqa: E402
from vision.data import ShardLoader, open_source  # noqa: E402
from vision.decode import DecodingLimits, open_image  # noqa: E402
from vision.image_transform import ImageTransform, padded_picture, resized_size  # noqa: E402
from vision.shard_writer import ShardWriter  # noqa: E402

CONFIG = presets.get("phi-3.5-vision")
SIZES = {"web, 640 wide": 640, "web, 1024 wide": 1024, "camera, 4000 wide": 4000}
PEAK = dict(PEAK_FLOPS)["H200"]["bfloat16"]
QUESTION = "What differs between the first and the second picture, and which of them was taken outdoors? "
ANSWER = "The first one shows a different scene; colours, light and the place of the camera are others. " * 3


def main() -> None:
    """Parses, measures, prints."""
    arguments = parse()
    torch.set_num_threads(1)
    pictures = photographs(arguments.photos) if arguments.shards is None else []
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.make is not None:
            write_shards(arguments.make, pictures, 1024, arguments.samples)
            print(f"{arguments.make}: {sum(path.stat().st_size for path in arguments.make.iterdir()) / 1e6:.1f} MB")
            return
        folder = arguments.shards
        if folder is None:
            folder = Path(temporary) / "shards"
            write_shards(folder, pictures, 1024, arguments.samples)
        record: dict[str, Any] = {"environment": environment(arguments.commit)}
        record["need"] = need(folder, arguments)
        if pictures:
            record["stages"] = [stages(name, pictures, width) for name, width in SIZES.items()]
            print_stages(record["stages"], record["need"])
        if arguments.train:
            record["training"] = train(folder, arguments)
        else:
            counts = sorted({1, 2, min(4, os.cpu_count() or 1)})
            record["consumer"] = [consume(folder, count, arguments, record["need"]) for count in counts]
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: scikit-image's)")
    parser.add_argument("--shards", type=Path, help="read these shards in place of writing some")
    parser.add_argument("--make", type=Path, help="write the shards there and stop")
    parser.add_argument("--samples", type=int, default=64, help="samples in the shards")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step")
    parser.add_argument("--workers", type=int, default=4, help="reading processes, with --train")
    parser.add_argument("--steps", type=int, default=24, help="timed steps")
    parser.add_argument("--mfu", type=float, default=0.4, help="that the device is assumed to reach")
    parser.add_argument("--train", action="store_true", help="train on a GPU")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="with --train")
    parser.add_argument("--tiny", action="store_true", help="with --train: the tiny preset, to try the script on a CPU")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    return parser.parse_args()


def photographs(folder: Path | None) -> list[Image.Image]:
    """Colour photographs of a folder, or of scikit-image."""
    if folder is None:
        found = importlib.util.find_spec("skimage")
        if found is None or found.origin is None:
            raise SystemExit("give --photos FOLDER, or --shards, or: pip install scikit-image")
        folder = Path(found.origin).parent / "data"
        names = ["astronaut", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left", "retina", "rocket"]
        files = [path for path in sorted(folder.iterdir()) if path.stem in names]
    else:
        files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    pictures = [open_image(path) for path in files]
    return pictures + [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in pictures]


def as_jpeg(picture: Image.Image, width: int) -> bytes:
    """The photograph at a width, as a camera or a web page stores it."""
    height = round(picture.height * width / picture.width)
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, pictures: list[Image.Image], width: int, count: int) -> None:
    """Samples of two photographs each."""
    files = [as_jpeg(picture, width) for picture in pictures]
    turns = [
        {"role": "user", "content": f"<|image_1|>\n<|image_2|>\n{QUESTION}"},
        {"role": "assistant", "content": ANSWER},
    ]
    with ShardWriter(folder, 32) as writer:
        for number in range(count):
            pair = [files[number % len(files)], files[(3 * number + 1) % len(files)]]
            writer.write(f"{number:06d}", {"messages": turns}, [("jpg", file) for file in pair])


def opened(folder: Path, arguments: argparse.Namespace, workers: int, **options: Any) -> ShardLoader:
    """The loader as a training run opens it, with the small tokenizer."""
    tokenizer = Tokenizer.from_folder(Path(presets.__file__).parent / "small_model")
    config = presets.get("tiny-phi-3.5-vision") if arguments.tiny else CONFIG
    return open_source(
        folder,
        model_config=config,
        processor=tokenizer,
        micro_batch_size=arguments.batch_size,
        num_workers=workers,
        packed=True,
        **options,
    )


def need(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Samples and pictures a second that one H200 takes."""
    batch = next(opened(folder, arguments, 0).compact())
    config = presets.get("tiny-phi-3.5-vision") if arguments.tiny else CONFIG
    work: Work = batch_work(batch, config)
    flops = TrainingFlops(config)(work) / arguments.batch_size
    rate = arguments.mfu * PEAK / flops
    pictures = len(batch["image_sizes"]) / arguments.batch_size
    print(
        f"a sample: {work.tokens / arguments.batch_size:.0f} tokens, {work.crops / arguments.batch_size:.1f} crops, "
        f"{flops / 1e12:.1f} TFLOP; at {arguments.mfu:.0%} of {PEAK / 1e12:.0f} TFLOP/s one GPU takes {rate:.1f} "
        f"samples/s, {rate * pictures:.1f} pictures/s"
    )
    return {"tflop_per_sample": flops / 1e12, "samples_per_second": rate, "pictures_per_second": rate * pictures}


def milliseconds(function: Any, repeats: int = 3) -> float:
    """The best of some tries, in time of this process on a core: other processes only ever add."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return 1000 * min(times)


def stages(name: str, pictures: list[Image.Image], width: int) -> dict[str, Any]:
    """Milliseconds of each stage for one picture, on one core."""
    files = [as_jpeg(picture, width) for picture in pictures[:7]]
    vision = CONFIG.vision
    assert vision is not None
    transform = ImageTransform(vision)

    def needed(width: int, height: int) -> tuple[int, int]:
        long, short = resized_size(max(width, height), min(width, height), vision.num_crops, vision)
        return (long, short) if width >= height else (short, long)

    fast = DecodingLimits(jpeg_size=needed)
    decoded = [open_image(file) for file in files]
    result: dict[str, Any] = {"pictures": name, "kilobytes": sum(map(len, files)) / len(files) / 1000}
    for stage, function in (
        ("decode", lambda: [open_image(file) for file in files]),
        ("resize and pad", lambda: [padded_picture(picture, vision.num_crops, vision) for picture in decoded]),
        (
            "both, fast_jpeg",
            lambda: [padded_picture(open_image(file, fast), vision.num_crops, vision) for file in files],
        ),
        ("all as float crops", lambda: [transform(file) for file in files]),
    ):
        result[stage] = milliseconds(function) / len(files)
    exact = [padded_picture(picture, vision.num_crops, vision) for picture in decoded]
    other = [padded_picture(open_image(file, fast), vision.num_crops, vision) for file in files]
    pairs = [(a, b) for a, b in zip(exact, other, strict=True) if a.shape == b.shape]
    errors = [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in pairs]
    result["fast_jpeg difference"] = [max(float(e.mean()) for e in errors), max(int(e.max()) for e in errors)]
    return result


def print_stages(rows: list[dict[str, Any]], needed: dict[str, float]) -> None:
    """Stage times, pictures a second and core, and the cores that keep a GPU busy."""
    print(f"\n{'JPEG photographs':<20}{'KB':>6}{'decode':>9}{'resize':>9}{'pictures/s':>12}{'cores':>7}", end="")
    print(f"{'fast_jpeg':>11}{'cores':>7}{'differs by':>16}{'float crops':>13}")
    for row in rows:
        took, fast = row["decode"] + row["resize and pad"], row["both, fast_jpeg"]
        cores = [needed["pictures_per_second"] * each / 1000 for each in (took, fast)]
        row |= {"pictures_per_second_and_core": 1000 / took, "cores": cores[0], "cores with fast_jpeg": cores[1]}
        mean, most = row["fast_jpeg difference"]
        print(
            f"{row['pictures']:<20}{row['kilobytes']:>6.0f}{row['decode']:>6.1f} ms{row['resize and pad']:>6.1f} ms",
            end="",
        )
        print(f"{1000 / took:>12.0f}{cores[0]:>7.2f}{1000 / fast:>9.0f}/s{cores[1]:>7.2f}", end="")
        print(f"{mean:>9.2f} ({most:>3})  {1000 / row['all as float crops']:>9.0f}/s")


def consume(folder: Path, workers: int, arguments: argparse.Namespace, needed: dict[str, float]) -> dict[str, Any]:
    """A consumer that is busy as long as the device would be, and how long it waits."""
    source = opened(folder, arguments, workers)
    busy = arguments.batch_size / needed["samples_per_second"]
    batches = source.compact()
    for _ in range(2 + workers):
        next(batches)
        time.sleep(busy)
    before, began = source.wait_seconds, time.perf_counter()
    for _ in range(arguments.steps):
        next(batches)
        time.sleep(busy)
    whole = time.perf_counter() - began
    part = (source.wait_seconds - before) / whole
    print(f"{workers} reading processes: a step takes {busy:.2f} s, {part:.2%} of the time goes to waiting for data")
    return {"workers": workers, "step_seconds": busy, "waiting": part}


class Training:
    """The model under the engine of a training run, on one device.

    Args:
        folder: of the shards.
        arguments: the command line.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        from phi35.loading import create
        from phi35.training.config import TrainingConfig
        from phi35.training.engine import Engine
        from phi35.training.environment import start
        from phi35.training.parameter_groups import freeze_parameters

        self.folder, self.arguments = folder, arguments
        preset = "tiny-phi-3.5-vision" if arguments.tiny else "phi-3.5-vision"
        place = start("cpu" if arguments.tiny else "cuda")
        self.device = place.device
        self.model_config = presets.get(preset)
        config = TrainingConfig(
            model=preset,
            dtype="bfloat16",
            global_batch_size=arguments.batch_size,
            max_steps=10_000,
            learning_rate=1e-5,
            schedule="constant",
            warmup_steps=0,
            gradient_checkpointing=arguments.gradient_checkpointing,
        ).resolve(world_size=1)
        model = create(self.model_config, device=self.device, dtype="bfloat16", seed=0)
        freeze_parameters(model, config)
        self.engine = Engine(model, config, place)
        self.numbers = iter(range(10_000))
        self.expand = opened(folder, arguments, 0).expand

    def moved(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the device, with its crops."""
        host = ("image_sizes", "sequence_lengths")
        there = {name: one if name in host else one.to(self.device, non_blocking=True) for name, one in batch.items()}
        return self.expand(there)

    def finish(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def steps(self, ready: Iterable[tuple[dict[str, torch.Tensor], int]]) -> float:
        """Seconds of a step on each batch, given with its number of label tokens."""
        self.finish()
        began, count = time.perf_counter(), 0
        for batch, num_tokens in ready:
            self.engine.set_learning_rate(next(self.numbers))
            self.engine.step([batch], [num_tokens], num_tokens)
            count += 1
        self.finish()
        return (time.perf_counter() - began) / count

    def steps_from_shards(self, count: int) -> tuple[float, float]:
        """(seconds of a step, part of the time that the host waited for data), reading anew."""
        from phi35.training.loss import count_label_tokens

        source = opened(self.folder, self.arguments, self.arguments.workers)
        batches = source.compact()
        first = next(batches)  # reading processes start, and begin with the very batches that lie on the device
        source.wait_seconds = 0.0
        seconds = self.steps(
            (self.moved(one), count_label_tokens(one["labels"])) for one in rest(first, batches, count)
        )
        return seconds, source.wait_seconds / (seconds * count)


def train(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps on batches that lie on the device, and the same steps on batches from the shards."""
    from phi35.training.loss import count_label_tokens

    training = Training(folder, arguments)
    batches = opened(folder, arguments, arguments.workers).compact()
    kept = [next(batches) for _ in range(arguments.steps)]
    counts = [count_label_tokens(batch["labels"]) for batch in kept]
    config = training.model_config
    flops = sum(TrainingFlops(config)(batch_work(batch, config)) for batch in kept) / len(kept)
    training.steps((training.moved(batch), count) for batch, count in zip(kept[:3], counts, strict=False))
    began = time.perf_counter()
    resident = [(training.moved(batch), count) for batch, count in zip(kept, counts, strict=True)]
    training.finish()
    moving = (time.perf_counter() - began) / len(kept)
    on_device, from_shards, waits = [], [], []
    for _ in range(2):
        on_device.append(training.steps(resident))
        seconds, waiting = training.steps_from_shards(len(kept))
        from_shards.append(seconds)
        waits.append(waiting)
    best, read = min(on_device), min(from_shards)
    result = {
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu",
        "workers": arguments.workers,
        "seconds_on_resident_batches": on_device,
        "seconds_from_shards": from_shards,
        "busy": best / read,
        "waiting_on_the_host": waits,
        "moving_and_cropping_seconds": moving,
        "mfu": flops / read / PEAK,
        "samples_per_second": arguments.batch_size / read,
    }
    print(
        f"step on resident batches {best:.3f} s, from shards {read:.3f} s: the device is busy {best / read:.1%} of the "
        f"time; the host waited {max(waits):.2%} for data; moving and cropping a batch {moving * 1000:.1f} ms; "
        f"MFU {result['mfu']:.1%}"
    )
    return result


def rest(first: dict[str, torch.Tensor], batches: Iterator[Any], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """``count`` batches, of which one was taken already."""
    yield first
    for _ in range(count - 1):
        yield next(batches)


def environment(commit: str | None) -> dict[str, Any]:
    """What the numbers depend on."""
    if commit is None:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = asked.stdout.strip() or "unknown"
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": importlib.metadata.version("pillow"),
    }


if __name__ == "__main__":
    main()
