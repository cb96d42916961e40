"""Questions about pictures during training: the accuracy is that of the exported model, and nothing is disturbed."""

import json

import pytest
from distributed import run_distributed


def train_vision(rank, world_size, values):
    """Losses as hex by step."""
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    # At stage 3 no weight stays whole between two uses, as none does of a model that is large enough to need it.
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    summary = train(TrainingConfig(**values), sharded if values["zero_stage"] == 3 else None, device="cpu")
    return None if summary is None else {line["step"]: line["loss"].hex() for line in summary.history}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from vision.easy_vqa_shards import prepare

    folder = tmp_path_factory.mktemp("easy-vqa")
    prepare(str(folder), "train", num_pairs=50)
    return str(folder)


def values_of(shards, output, **changes):
    base = {
        "model": "tiny-phi-3.5-vision",
        "model_overrides": {"vision": {"num_crops": 1}, "resid_pdrop": 0.1},
        "data": shards,
        "data_options": {"augmentation": True},
        "global_batch_size": 4,
        "max_steps": 4,
        "warmup_steps": 1,
        "output_dir": str(output),
        "trackers": [],
        "export": True,
    }
    return {**base, **changes}


@pytest.mark.parametrize("stage", [2, 3])
def test_accuracy_and_held_out_loss_of_a_vision_run(shards, tmp_path, stage):
    from phi35.evaluation.demo import evaluate
    from phi35.loading import load

    world_size = 2
    quiet = values_of(shards, tmp_path / "quiet", zero_stage=stage, export=False)
    evaluated = values_of(
        shards, tmp_path / "run", zero_stage=stage, eval_interval=2, eval_samples=8, eval_data=shards, eval_questions=1
    )
    losses = run_distributed(train_vision, world_size, quiet)[0]
    assert run_distributed(train_vision, world_size, evaluated)[0] == losses
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and all(line["loss"] > 0 for line in lines)
    result = evaluate(*load(tmp_path / "run" / "model", device="cpu", dtype="float32"), limit=1)
    correct, count = (sum(getattr(score, name) for score in result.scores) for name in ("correct", "count"))
    assert lines[-1]["questions"] == count and lines[-1]["accuracy"] == correct / count


def test_a_part_of_the_samples_is_held_out(shards):
    from phi35 import presets
    from phi35.processor import Processor
    from phi35.training.build import SMALL_MODEL
    from vision.data import open_source

    config = presets.get("tiny-phi-3.5-vision")
    common = {"model_config": config, "processor": Processor.from_folder(SMALL_MODEL, config)}
    visits = {}
    for part in ("train", "held_out"):
        (reader,) = open_source(shards, **common, held_out=0.1, part=part).dataset.readers
        visits[part] = {number for number, draws in enumerate(reader.draws) if draws}
    (whole,) = open_source(shards, **common).dataset.readers
    everything = {number for number, draws in enumerate(whole.draws) if draws}
    assert not visits["train"] & visits["held_out"] and visits["train"] | visits["held_out"] == everything
    assert len(visits["held_out"]) == pytest.approx(0.1 * len(everything), abs=2)


def test_questions_for_a_text_model_are_refused():
    from phi35 import presets
    from phi35.training.config import TrainingConfig
    from phi35.training.evaluation import check_evaluation

    config = TrainingConfig(eval_interval=1, eval_questions=1)
    with pytest.raises(ValueError, match="text-only"):
        check_evaluation(config, presets.get("tiny-phi-3.5-mini"))
