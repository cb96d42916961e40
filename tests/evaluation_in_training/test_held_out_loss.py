"""Evaluation during training: what is held out, its loss, that nothing is disturbed, and the best checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
from distributed import run_distributed
from training_runs import settings, tensors_of, text_files, train_and_read

from phi35.data.stream import is_held_out

NOISY = {"model_overrides": {"resid_pdrop": 0.1, "embd_pdrop": 0.1}}
EVALUATED = {"eval_interval": 2, "eval_samples": 8}


def documents(folder, count=60):
    """A folder with a file of JSON lines."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"number {n} squared is {n * n}, halved {n / 2}"}) for n in range(count)]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return str(folder)


def evaluations(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def open_part(folder, part, tmp_path, micro_batch_size=2):
    from phi35 import presets
    from phi35.data.opening import open_text
    from phi35.processor import Processor
    from phi35.training.build import SMALL_MODEL

    config = presets.get("tiny-phi-3.5-mini")
    return open_text(
        folder, model_config=config, processor=Processor.from_folder(SMALL_MODEL, config), rank=0, world_size=1,
        micro_batch_size=micro_batch_size, seed=0, sequence_length=32, num_samples=40, cache_folder=tmp_path / "cache",
        barrier=lambda: None, held_out=0.25, part=part,
    )  # fmt: skip


def test_parts_share_no_document_and_leave_none_out(tmp_path):
    folder = documents(tmp_path / "data")
    seen = {}
    for part in ("train", "held_out"):
        stream = open_part(folder, part, tmp_path).mixture.streams[0]
        taken = []
        while stream.state_dict()["epoch"] == 0:
            taken.append(next(stream).document)
        seen[part] = set(taken[:-1])  # the last one began the next epoch
    assert not seen["train"] & seen["held_out"]
    assert seen["train"] | seen["held_out"] == set(range(60))
    assert seen["held_out"] == {number for number in range(60) if is_held_out(number, 0.25)}
    assert 5 <= len(seen["held_out"]) <= 25
    share = np.mean([is_held_out(number, 0.02) for number in range(100_000)])
    assert share == pytest.approx(0.02, abs=0.002)


def test_loss_is_the_plain_models_over_the_held_out_tokens(tmp_path):
    from phi35.loading import load

    folder = documents(tmp_path / "data")
    values = settings(
        folder, tmp_path / "run", sequence_length=32, held_out=0.25, eval_interval=6, eval_samples=6,
        micro_batch_size=2, export=True, max_steps=10,
    )  # fmt: skip
    run_distributed(train_and_read, 1, values)
    (at_six, last) = evaluations(tmp_path / "run")
    assert (at_six["step"], last["step"], last["samples"]) == (6, 10, 6) and last["best"]
    model = load(tmp_path / "run" / "model", device="cpu", dtype="float32")[0].eval()
    source, total, count = open_part(folder, "held_out", tmp_path), 0.0, 0
    for _, batch in zip(range(3), source, strict=False):
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        targets = batch["labels"][:, 1:].clone()
        for row, lengths in enumerate(batch["sequence_lengths"].tolist()):
            for end in np.cumsum(lengths)[:-1]:
                if 0 < end < batch["labels"].shape[1]:
                    targets[row, end - 1] = -100  # the first token of a sample is not another's to predict
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
        keep = targets.flatten() >= 0
        total, count = total + float(losses[keep].double().sum()), count + int(keep.sum())
    assert last["tokens"] == count
    assert last["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"zero_stage": 0, "dtype": "bfloat16", **NOISY}),
        (2, {"zero_stage": 1, "model": "tiny-phi-3.5-moe", "ep_size": 2, "dtype": "bfloat16", "ema_decay": 0.5}),
    ],
    ids=["zero0-bf16", "moe-ep2"],
)
def test_evaluations_disturb_nothing_and_resume_to_the_bit(tmp_path, world_size, changes):
    text = text_files(tmp_path)
    quiet = settings(text, tmp_path / "quiet", **changes)
    evaluated = {**quiet, **EVALUATED, "eval_data": text, "output_dir": str(tmp_path / "evaluated")}
    losses = run_distributed(train_and_read, world_size, quiet)[0]
    assert run_distributed(train_and_read, world_size, evaluated)[0] == losses
    one, other = (tensors_of(tmp_path / name / "checkpoints" / "step-00000006") for name in ("quiet", "evaluated"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    whole = evaluations(tmp_path / "evaluated")
    assert [line["step"] for line in whole] == [2, 4, 6]
    shutil.rmtree(tmp_path / "evaluated" / "checkpoints" / "step-00000006")
    assert run_distributed(train_and_read, world_size, evaluated)[0] == losses
    assert evaluations(tmp_path / "evaluated") == whole  # the line of step 4 came a second time, with the same numbers


def test_every_layout_gives_the_same_loss(tmp_path):
    text = text_files(tmp_path)
    still = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    common = {"model": "tiny-phi-3.5-moe", "model_overrides": still, "router_aux_loss_coef": 0.0, **EVALUATED}
    found = []
    for number, (world_size, layout) in enumerate(
        [(1, {"zero_stage": 0}), (2, {"zero_stage": 2, "ep_size": 2}), (2, {"zero_stage": 3, "micro_batch_size": 1})]
    ):
        values = settings(text, tmp_path / str(number), max_steps=4, **common, **layout, eval_data=text)
        run_distributed(train_and_read, world_size, values)
        found.append(evaluations(tmp_path / str(number)))
    for lines in found[1:]:
        assert [line["tokens"] for line in lines] == [line["tokens"] for line in found[0]]
        for line, reference in zip(lines, found[0], strict=True):
            assert line["loss"] == pytest.approx(reference["loss"], abs=1e-5)


def test_the_best_checkpoints_stay_and_are_exported(tmp_path):
    from phi35.loading import load
    from phi35.training.checkpoint_files import complete_checkpoints, step_of
    from phi35.training.export import export

    text = text_files(tmp_path)
    values = settings(
        text, tmp_path / "run", max_steps=12, save_interval=6, keep_last=1, keep_best=2, eval_data=text,
        schedule="constant", learning_rate=0.05, **EVALUATED,
    )  # fmt: skip
    run_distributed(train_and_read, 1, values)
    lines = sorted(evaluations(tmp_path / "run"), key=lambda line: line["loss"])
    best = [line["step"] for line in lines[:2]]
    kept = {step_of(path) for path in complete_checkpoints(tmp_path / "run" / "checkpoints")}
    assert kept == {*best, 12}
    folder = export(tmp_path / "run", tmp_path / "best", best=True)
    exported = load(folder, device="cpu", dtype="float32")[0].lm_head.weight.detach()
    stored = tensors_of(tmp_path / "run" / "checkpoints" / f"step-{best[0]:08d}")
    assert torch.equal(exported, stored["parameter", "lm_head.weight"])
    marked = [line["step"] for line in evaluations(tmp_path / "run") if line["best"]]
    lowest, expected = float("inf"), []
    for line in evaluations(tmp_path / "run"):
        if line["loss"] < lowest:
            lowest = line["loss"]
            expected.append(line["step"])
    assert marked == expected


def test_settings_without_evaluations_are_refused():
    from phi35.training.config import TrainingConfig

    with pytest.raises(ValueError, match="'eval_data', 'keep_best'.*set eval_interval"):
        TrainingConfig(eval_data="folder", keep_best=1)
    with pytest.raises(ValueError, match="held_out must lie"):
        TrainingConfig(held_out=1.0)
