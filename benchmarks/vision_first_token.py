"""Pictures to the first token: the stages beside their bounds, for 1 and 8 pictures of 4 and 16 crops.

    python benchmarks/vision_first_token.py                   # phi-3.5-vision on a GPU, bfloat16, random weights
    python benchmarks/vision_first_token.py --profile         # and where the host's time of one first token goes
    python benchmarks/vision_first_token.py --small           # a tiny model: shows that it runs, on a CPU too

"transform" reads square pictures from memory on the host; "tower" is CLIP over all crops at once, "features" the tower,
the merge and the projection, "prefill" the decoder over pictures and 64 tokens of text. "first" is the whole call, from
pixels on the host to the first token; "again" the same with the features kept by content, "digest" what finding them
costs. "whole" is "first" from pictures in memory, "whole_again" the same with their crops and features kept. "graph" is
the tower from a CUDA graph, which few crops take. Bounds are operations by the rate of a square matrix product of
8,192. Medians, warm. Prints a table and, last, one JSON line.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402
import transformers_peer  # noqa: E402
from decode import attempt  # noqa: E402
from prefill import attention_flops, flops  # noqa: E402

import phi35  # noqa: E402
from phi35 import registry  # noqa: E402
from phi35.config import ModelConfig  # noqa: E402
from phi35.generation import step_pool  # noqa: E402
from phi35.generation.decoding import Decoding  # noqa: E402
from phi35.generation.fast_prefill import Prompt, prefill  # noqa: E402
from phi35.image_cache import ImageFeatureCache  # noqa: E402

TEXT = 64


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--crops", type=int, nargs="+", default=[4, 16], help="num_crops")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="profile one first token of each case")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        raise SystemExit("no CUDA device is visible; --small runs a tiny model on the CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/vision_first_token.py", *sys.argv[1:]])
    record["dense_tflops"] = moe_layer.dense_rate(512 if device.type == "cpu" else 8192, device, dtype, 15)
    print(f"{record['environment']['device']}: dense {record['dense_tflops']:.2f} TFLOP/s", flush=True)
    preset = "tiny-phi-3.5-vision" if arguments.small else "phi-3.5-vision"
    model = phi35.create(preset, device=device, dtype=dtype, seed=0).eval()
    for pictures in arguments.pictures:
        for crops in arguments.crops:
            name = f"{pictures} pictures, {crops} crops"
            attempt(record, name, lambda p=pictures, c=crops: measure(model, p, c, arguments, record))  # type: ignore[misc]
    report(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def tower_flops(config: ModelConfig, crops: int) -> float:
    """Operations of the tower's blocks that run: linear layers and attention, and the patches' product."""
    vision = config.vision
    assert vision is not None
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens, width = patches + 1, vision.hidden_size
    linear = 4 * width * width + 2 * width * vision.intermediate_size
    block = 2.0 * tokens * linear + 4.0 * tokens * tokens * width
    patch = 2.0 * patches * 3 * vision.patch_size**2 * width
    return crops * ((vision.num_hidden_layers - 1) * block + patch)


def projector_flops(config: ModelConfig, features: int) -> float:
    """Operations of the two products that make embeddings of merged patches."""
    assert config.vision is not None
    return 2.0 * features * config.hidden_size * (4 * config.vision.hidden_size + config.hidden_size)


@torch.no_grad()
def measure(
    model: Any, pictures: int, num_crops: int, arguments: argparse.Namespace, record: dict[str, Any]
) -> dict[str, Any]:
    """One case: times in milliseconds, and bounds."""
    config, device, rounds = model.config, model.device, arguments.rounds
    transform = registry.resolve("processor.images")(config.vision)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (pictures, 700, 700, 3), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(one.numpy()) for one in raw]
    row: dict[str, Any] = {"pictures": pictures, "num_crops": num_crops}
    row["transform"], crops = median(lambda: transform.many(images, [num_crops] * pictures), 3)
    pixels = torch.cat([crop.pixel_values for crop in crops])
    sizes = torch.tensor([tuple(crop.image_size) for crop in crops])
    counts = [crop.num_tokens for crop in crops]
    row |= {"crops": len(pixels), "image_tokens": sum(counts)}
    row["copy"], moved = median(lambda: pixels.to(device, model.dtype), rounds)
    embedding = model.model.vision_embed_tokens
    row["tower"], _ = median(lambda: embedding.img_processor(moved), rounds)
    row["features"], _ = median(lambda: embedding.features(moved, sizes), rounds)
    with embedding.tower_from_graphs():
        embedding.features(moved, sizes)
        row["graph"], _ = median(lambda: embedding.features(moved, sizes), rounds)
    cache = ImageFeatureCache(2**31)
    cache.features(embedding, moved, sizes)
    row["digest"], _ = median(lambda: cache.features(embedding, moved, sizes), rounds)
    marks = [-1 - number for number, count in enumerate(counts) for _ in range(count)]
    text = torch.randint(5, min(1000, config.vocab_size), (TEXT,), generator=generator).tolist()
    ids = torch.tensor([marks + text])
    row["tokens"] = ids.shape[1]
    empty = model.new_cache(1, ids.shape[1])
    long = config.rope_scaling is not None and ids.shape[1] > config.original_max_position_embeddings
    embeds = embedding(ids.to(device), model.model.embed_tokens(ids.clamp(min=0).to(device)), moved, sizes)[0]
    prompts = [Prompt(ids[0].tolist(), embeds, 0, long)]
    plain = device.type == "cpu"
    row["prefill"], _ = median(lambda: prefill(model, empty, prompts, plain=plain), rounds)

    def first() -> Decoding:
        decoding = Decoding(model, ids, None, pixels, sizes, max_new_tokens=2, stop_token_ids=())
        decoding.step()
        return decoding

    def whole() -> Decoding:
        transform.many(images, [num_crops] * pictures)
        return first()

    model.image_feature_cache = None
    row["first"], _ = median(first, rounds, Decoding.step)
    row["whole"], _ = median(whole, rounds, Decoding.step)
    model.image_feature_cache, transform.cache = cache, registry.resolve("images.cache")(2**31)
    row["again"], _ = median(first, rounds, Decoding.step)
    row["whole_again"], _ = median(whole, rounds, Decoding.step)
    model.image_feature_cache = None
    if arguments.profile:
        profile_host(lambda: first().step())
    step_pool.drop(model)
    rate = record["dense_tflops"] * 1e9
    row["tower_bound"] = tower_flops(config, len(pixels)) / rate
    row["projector_bound"] = projector_flops(config, sum(counts)) / rate
    row["prefill_bound"] = (flops(config, ids.shape[1])[1] + attention_flops(config, ids.shape[1])) / rate
    row["bound"] = row["tower_bound"] + row["projector_bound"] + row["prefill_bound"]
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def profile_host(call: Callable[[], Any], lines: int = 25) -> None:
    """Print the functions in which the host spends the time of one call, with all that they call."""
    profiler = cProfile.Profile()
    call()
    transformers_peer.synchronise()
    profiler.runcall(call)
    transformers_peer.synchronise()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(lines)


def median(call: Callable[[], Any], rounds: int, end: Callable[[Any], Any] | None = None) -> tuple[float, Any]:
    """Median milliseconds of a call after one to warm up, and its last result, which ``end`` takes untimed."""
    times, result = [], None
    for turn in range(rounds + 1):
        result = None  # its cache must not lie beside the next one's
        transformers_peer.synchronise()
        start = time.perf_counter()
        result = call()
        transformers_peer.synchronise()
        if turn:
            times.append(1e3 * (time.perf_counter() - start))
        if end is not None:
            end(result)
    return statistics.median(times), result


def report(record: dict[str, Any]) -> None:
    """The table, in milliseconds."""
    names = ("transform", "copy", "tower", "features", "graph", "prefill", "digest")
    names += ("first", "again", "whole", "whole_again")
    print(f"{'pictures':>8s}{'crops':>7s}{'tokens':>8s}" + "".join(f"{name:>12s}" for name in names) + f"{'bound':>9s}")
    for row in (row for row in record.get("rows", []) if "first" in row):
        print(
            f"{row['pictures']:8d}{row['crops']:7d}{row['tokens']:8d}"
            + "".join(f"{row[name]:12.2f}" for name in names)
            + f"{row['bound']:9.2f}  tower {100 * row['tower_bound'] / row['tower']:.0f} %, "
            f"prefill {100 * row['prefill_bound'] / row['prefill']:.0f} %, "
            f"all {100 * row['bound'] / row['first']:.0f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
