"""What few bits cost: the small vision model, and text models trained here, dense and sparse, beside themselves.

    python benchmarks/quantize_quality.py                       # about ten minutes on two cores; trains once
    python benchmarks/quantize_quality.py --steps 5 --questions 40 --tokens 4096      # shows that it runs

Text: two models of 256 columns and 4 layers (the sparse one with 8 experts of 256 columns) are trained on the
interpreter's library; perplexity, error of the logits and agreement of the most likely tokens are taken on files that
neither training nor calibration saw, against the same model in float32. Vision: questions of easy-vqa's test split.
GPTQ is calibrated on training data. Prints tables and, last, one JSON line.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402

import phi35  # noqa: E402
from phi35 import presets  # noqa: E402
from phi35.api import SMALL_MODEL  # noqa: E402
from phi35.config import ModelConfig  # noqa: E402
from phi35.data.documents import document_files  # noqa: E402
from phi35.loading import load, load_processor  # noqa: E402
from phi35.quantization.calibrate import quantize_calibrated  # noqa: E402
from phi35.quantization.config import QuantizationConfig, WeightFormat  # noqa: E402
from phi35.quantization.convert import quantize  # noqa: E402

LENGTH = 256
HELD_OUT = 12
"""One file in so many is kept from training."""


def form(bits: int, group: int | None, **changes: Any) -> WeightFormat:
    """A format."""
    return WeightFormat(bits=bits, group_size=group, **changes)


FP8 = form(8, None, type="float")
TEXT = {
    "bfloat16": None,
    "int8 g128": QuantizationConfig(linear=form(8, 128)),
    "fp8 rows": QuantizationConfig(linear=FP8),
    "int4 g128": QuantizationConfig(linear=form(4, 128)),
    "int4 g128 zero points": QuantizationConfig(linear=form(4, 128, symmetric=False)),
    "int4 g32": QuantizationConfig(linear=form(4, 32)),
    "int4 g128, byte scales, all": QuantizationConfig(
        linear=form(4, 128, scale_bits=8), embedding=form(4, 128, scale_bits=8), head=form(4, 128, scale_bits=8)
    ),
    "int4 g128 gptq": QuantizationConfig(linear=form(4, 128), method="gptq"),
    "int4 g32 gptq": QuantizationConfig(linear=form(4, 32), method="gptq"),
    "int4 g128 zero points gptq": QuantizationConfig(linear=form(4, 128, symmetric=False), method="gptq"),
}
VISION = {
    "bfloat16": None,
    "int8 g64": QuantizationConfig(linear=form(8, 64)),
    "fp8 rows": QuantizationConfig(linear=FP8),
    "int4 g64": QuantizationConfig(linear=form(4, 64)),
    "int4 g32": QuantizationConfig(linear=form(4, 32)),
    "int4 g64, tower int8": QuantizationConfig(linear=form(4, 64), tower=form(8, 64)),
    "int4 g64, all int4": QuantizationConfig(
        linear=form(4, 64), embedding=form(4, 64), head=form(4, 64), tower=form(4, 64)
    ),
    "int4 g64 gptq": QuantizationConfig(linear=form(4, 64), method="gptq"),
    "int4 g32 gptq": QuantizationConfig(linear=form(4, 32), method="gptq"),
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training, 8 rows of 256 tokens each")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    parser.add_argument("--questions", type=int, default=2000, help="about pictures, a third of them about two")
    parser.add_argument("--models", type=Path, help="folder that keeps the trained models (default: none are kept)")
    parser.add_argument("--parts", nargs="+", default=["dense", "sparse", "vision"])
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*has no tokenizer")
    record: dict[str, Any] = {"environment": moe_layer.environment(torch.device("cpu"), arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/quantize_quality.py", *sys.argv[1:]])
    for part in arguments.parts:
        record[part] = vision(arguments) if part == "vision" else text(part, arguments)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def text_ids(held_out: bool) -> torch.Tensor:
    """(n, LENGTH) ids of the interpreter's library, of the files kept apart or of the others."""
    tokenizer = load_processor(SMALL_MODEL, presets.get("small-vision")).tokenizer  # type: ignore[union-attr]
    ids: list[int] = []
    for path in document_files("stdlib"):
        if (zlib.crc32(path.name.encode()) % HELD_OUT == 0) != held_out:
            continue
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")[:20000], add_special_tokens=False)
        if len(ids) > 4_000_000:
            break
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def text_config(kind: str) -> ModelConfig:
    """The model that is trained."""
    base = presets.get("tiny-phi-3.5-moe" if kind == "sparse" else "tiny-phi-3-mini-4k")
    return base.replace(
        hidden_size=256,
        intermediate_size=256 if kind == "sparse" else 768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        rope_scaling=None,
        max_position_embeddings=4096,
        num_local_experts=8 if kind == "sparse" else 0,
        sliding_window=None,
    )


def trained(kind: str, arguments: argparse.Namespace, folder: Path) -> Path:
    """A folder with the trained model in bfloat16; made where absent."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model = phi35.create(text_config(kind), seed=0).train()
    ids = text_ids(held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    for step in range(arguments.steps):
        share = step / arguments.steps
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * share))
        rows = ids[torch.randint(len(ids), (8,))]
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == arguments.steps - 1:
            print(
                f"{kind}: step {step}, loss {float(loss.detach()):.3f}, {time.perf_counter() - start:.0f} s", flush=True
            )
    phi35.save(model.eval().bfloat16(), None, folder)
    return folder


def text(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model, quantize it in every way, compare."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = trained(kind, arguments, (arguments.models or Path(scratch)) / f"quality-{kind}-{arguments.steps}")
        held_out = text_ids(held_out=True)[: arguments.tokens // LENGTH]
        training = text_ids(held_out=False)
        batches = [{"input_ids": row[None]} for row in training[:: max(1, len(training) // 128)][:128]]
        reference = logits_of(load(folder, dtype="float32")[0], held_out)
        plain = perplexity(reference, held_out)
        print(f"\n{kind}: float32 perplexity {plain:.4f} on {held_out.numel():,} held-out tokens", flush=True)
        result: dict[str, Any] = {"perplexity": plain, "rows": []}
        for name, wanted in TEXT.items():
            model, row = quantized(folder, Path(scratch) / "few", wanted, batches)
            found = logits_of(model, held_out)
            row |= {"name": name, "perplexity": perplexity(found, held_out)} | compared(found, reference)
            result["rows"].append(row)
            print(
                f"  {name:30s}{row['perplexity']:9.4f} ({100 * (row['perplexity'] / plain - 1):+.2f} %), logits "
                f"{row['logits_error']:.4f}, same token {100 * row['agreement']:.2f} %, divergence {row['kl']:.5f}",
                flush=True,
            )
            if "expert_tokens" in row:
                print(f"    {row['calibration']}", flush=True)
    return result


def quantized(
    source: Path, target: Path, wanted: QuantizationConfig | None, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[Any, dict[str, Any]]:
    """The model in a format, computing in float32 (bfloat16 itself: in bfloat16), and what calibration says."""
    if wanted is None:
        return load(source, dtype="bfloat16")[0], {}
    row: dict[str, Any] = {}
    if wanted.method == "gptq":
        report = quantize_calibrated(source, target, wanted, batches)
        row = {"calibration": report.summary(), "rounded": report.rounded}
        if report.expert_tokens:
            row["expert_tokens"] = report.expert_tokens
    else:
        quantize(source, target, wanted)
    return load(target, dtype="float32")[0], row


@torch.inference_mode()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(n, LENGTH, V) float32."""
    return torch.cat([model(input_ids=part).logits.float() for part in ids.split(16)])


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Of the next tokens."""
    parts = zip(logits[:, :-1].split(16), ids[:, 1:].split(16), strict=True)
    total = sum(float(F.cross_entropy(a.flatten(0, 1), b.flatten(), reduction="sum")) for a, b in parts)
    return math.exp(total / ids[:, 1:].numel())


def compared(found: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Relative error of centred logits, share of equal most likely tokens, mean divergence of the distributions."""
    error = norm = agreement = divergence = 0.0
    for mine, theirs in zip(found.split(16), reference.split(16), strict=True):
        a, b = (part - part.mean(dim=-1, keepdim=True) for part in (mine, theirs))
        error, norm = error + float((a - b).square().sum()), norm + float(b.square().sum())
        agreement += float((a.argmax(-1) == b.argmax(-1)).sum())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        divergence += float((log_b.exp() * (log_b - log_a)).sum())
    count = reference[..., 0].numel()
    return {"logits_error": (error / norm) ** 0.5, "agreement": agreement / count, "kl": divergence / count}


def vision(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model inside the package: accuracy, and answers that equal those in float32."""
    from phi35.evaluation.batched import Question, answer
    from vision.easy_vqa import evaluation_questions

    split, questions = evaluation_questions(max(1, arguments.questions // 3))
    single = [question for question in questions if len(question.images) == 1]
    pairs = [question for question in questions if len(question.images) > 1]
    count = arguments.questions - len(pairs)
    chosen = [*single[:: max(1, len(single) // count)][:count], *pairs]
    model, processor = load(SMALL_MODEL, dtype="float32")
    assert processor is not None
    pictures = split.image_paths
    asked = [Question(question.prompt, question.images) for question in chosen]
    reference = answer(model, processor, asked, pictures)
    batches = vision_batches(processor)
    result: dict[str, Any] = {"questions": len(chosen), "accuracy": share(reference, chosen), "rows": []}
    print(f"\nvision: {len(chosen):,} questions, float32 {100 * result['accuracy']:.2f} % right", flush=True)
    probe = vision_probe(processor, chosen, pictures)
    with torch.inference_mode():
        expected = model(**probe).logits[:, -1]
    with tempfile.TemporaryDirectory() as scratch:
        for name, wanted in VISION.items():
            other, row = quantized(SMALL_MODEL, Path(scratch), wanted, batches)
            found = answer(other, processor, asked, pictures)
            with torch.inference_mode():
                logits = other(**probe).logits[:, -1].float()
            same = sum(a == b for a, b in zip(found, reference, strict=True)) / len(chosen)
            row |= {"name": name, "accuracy": share(found, chosen), "same_answers": same}
            row["logits_error"] = float((logits - expected).norm() / expected.norm())
            result["rows"].append(row)
            print(
                f"  {name:30s}{100 * row['accuracy']:7.2f} %, same answers {100 * same:.2f} %, logits of the first "
                f"answer token {row['logits_error']:.4f}",
                flush=True,
            )
    return result


def share(answers: Sequence[str], questions: Sequence[Any]) -> float:
    """Of right answers."""
    pairs = zip(answers, questions, strict=True)
    return sum(given.strip().lower() == question.answer for given, question in pairs) / len(questions)


def vision_batches(processor: Any) -> list[dict[str, torch.Tensor]]:
    """Calibration: training questions with their pictures, one row each, answers included."""
    from vision.easy_vqa import load_split

    split, batches = load_split("train"), []
    for question in split.questions[:: len(split.questions) // 256][:256]:
        prompt = processor.apply_chat_template([{"role": "user", "content": question.prompt}]) + question.answer
        batches.append(dict(processor(prompt, images=[split.image_paths[key] for key in question.images])))
    return batches


def vision_probe(processor: Any, questions: Sequence[Any], pictures: Any) -> dict[str, torch.Tensor]:
    """Inputs of 64 questions."""
    few = questions[:: max(1, len(questions) // 64)][:64]
    prompts = [processor.apply_chat_template([{"role": "user", "content": question.prompt}]) for question in few]
    return dict(processor(prompts, images=[[pictures[key] for key in question.images] for question in few]))


if __name__ == "__main__":
    main()
