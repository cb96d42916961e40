"""What a run computes depends on nothing but its settings: not on stops, stages, ranks or where the experts lie."""

import itertools
import shutil

import pytest
import torch
from distributed import run_distributed
from picture_shards import write_picture_shards
from rank_processes import allow_children
from stepped_engines import build_engine, make_steps, state_of

from phi35.training.checkpoint_files import CheckpointReader

NOISY = {"resid_pdrop": 0.1, "embd_pdrop": 0.1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1, "input_jitter_noise": 0.05}
STILL = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_picture_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        lines = [f"value_{number}_{line} = compute({line * 7 % 13})" for line in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines))
    return str(folder)


def losses_by_step(rank, world_size, values):
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    allow_children()
    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else {line["step"]: line["loss"].hex() for line in summary.history}


def tensors_of(folder):
    reader = CheckpointReader(folder)
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    return {(kind, name): reader.read(kind, name) for kind in kinds for name in reader.names(kind)}


def vision_settings(shards, output, overrides, **changes):
    base = {
        "model": "tiny-phi-3.5-vision",
        "model_overrides": {"vision": {"num_crops": 1}, **overrides},
        "data": shards,
        "data_options": {"augmentation": True},
        "num_workers": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": 6,
        "warmup_steps": 2,
        "save_interval": 3,
        "keep_last": 0,
        "output_dir": str(output),
        "export": False,
        "trackers": [],
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("world_size", "overrides", "changes"),
    [
        (1, NOISY, {"zero_stage": 0, "dtype": "bfloat16"}),
        (2, NOISY, {"zero_stage": 2}),
        (2, {**NOISY, **EXPERTS}, {"zero_stage": 1, "ep_size": 2, "dtype": "bfloat16", "router_aux_loss_coef": 0.01}),
    ],
    ids=["zero0-bf16", "zero2", "zero1-ep2-bf16"],
)
def test_pictures_three_steps_and_three_more_equal_six_to_the_bit(shards, tmp_path, world_size, overrides, changes):
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    values = vision_settings(shards, straight, overrides, **changes)
    losses = run_distributed(losses_by_step, world_size, values)[0]
    shutil.copytree(straight, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000006")
    assert run_distributed(losses_by_step, world_size, {**values, "output_dir": str(parted)})[0] == losses
    assert len(losses) == len(set(losses.values())) == 6
    one, other = (tensors_of(folder / "checkpoints" / "step-00000006") for folder in (straight, parted))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_experts_saved_on_two_ranks_train_on_one_two_and_four(text_folder, tmp_path, ep_size):
    base = {
        "model": "tiny-phi-3.5-moe",
        "model_overrides": STILL,
        "router_aux_loss_coef": 0.0,
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 8,
        "max_steps": 6,
        "warmup_steps": 2,
        "adam_epsilon": 1e-4,
        "save_interval": 3,
        "keep_last": 0,
        "export": False,
        "trackers": [],
        "zero_stage": 1,
    }
    first = tmp_path / "first"
    losses = run_distributed(losses_by_step, 2, {**base, "ep_size": 2, "output_dir": str(first)})[0]
    shutil.rmtree(first / "checkpoints" / "step-00000006")
    got = run_distributed(losses_by_step, ep_size, {**base, "ep_size": ep_size, "output_dir": str(first)})[0]
    errors = [abs(float.fromhex(got[step]) - float.fromhex(losses[step])) for step in (4, 5, 6)]
    print(
        f"ep 2 to {ep_size}: losses differ by at most {max(errors):.1e}"
    )  # measured: 9.5e-7, two units in the last place
    assert max(errors) <= 1e-6


def every_stage_to_every_stage(rank, world_size, root, dtype):
    """State after two steps at a stage, loaded at another: differing tensors, and the next loss beside its own."""
    from phi35.training import checkpoint
    from phi35.training.saving import save

    differing, losses = {}, {}
    for stage in range(4):
        engine = build_engine({"zero_stage": stage, "dtype": dtype, "adam_epsilon": 1e-4})
        make_steps(rank, engine, left_out=(2, 3))
        folder = save(f"{root}/{stage}", 2, engine, {"data": {}})
        saved = state_of(engine)
        for other in range(4):
            loaded = build_engine({"zero_stage": other, "dtype": dtype, "adam_epsilon": 1e-4})
            checkpoint.restore(loaded, CheckpointReader(folder))
            kept = {name: value for name, value in state_of(loaded).items() if not name.endswith("in the model")}
            differing[stage, other] = [name for name, value in kept.items() if not torch.equal(value, saved[name])]
            losses[stage, other] = [float(result.loss) for result in make_steps(rank, loaded, left_out=(0, 1))]
    return differing, losses


def test_every_stage_loads_every_stages_checkpoint(tmp_path):
    results = run_distributed(every_stage_to_every_stage, 2, str(tmp_path), "float32")
    worst = 0.0
    for differing, losses in results:
        assert set(differing) == set(itertools.product(range(4), range(4))) and not any(differing.values())
        for (stage, other), values in losses.items():
            worst = max(worst, *(abs(a - b) for a, b in zip(values, losses[stage, stage], strict=True)), 0.0)
            assert values == pytest.approx(losses[stage, stage], abs=1e-6), (stage, other)
    print(f"16 pairs of stages: losses differ by at most {worst:.1e}")  # measured: 2.4e-7


def updates_of(rank, world_size, micro_batch_size, stage):
    """Losses, norms and weights of two clipped updates over one global batch of 8 rows of very different lengths."""
    from phi35.training.loss import count_label_tokens
    from phi35.training.optimizer_state import PARAMETER, OptimizerState

    engine = build_engine(
        {
            "zero_stage": stage,
            "global_batch_size": 8,
            "micro_batch_size": micro_batch_size,
            "gradient_clipping": 0.2,
            "adam_epsilon": 1e-4,
        }
    )
    ids = torch.randint(3, 900, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, cut in enumerate((0, 9, 5, 11, 2, 7, 1, 10)):
        labels[row, :cut] = -100
    losses, norms = [], []
    for step in range(2):
        starts = range(rank * micro_batch_size, 8, micro_batch_size * world_size)
        micro = [
            {"input_ids": ids[i : i + micro_batch_size], "labels": labels[i : i + micro_batch_size]} for i in starts
        ]
        engine.set_learning_rate(step)
        counts = [count_label_tokens(one["labels"]) for one in micro]
        result = engine.step(micro, counts, count_label_tokens(labels))
        share = result.loss.clone()
        if world_size > 1:
            torch.distributed.all_reduce(share)
        losses.append(share.item())
        norms.append(float(result.gradient_norm))
    state = OptimizerState(engine)
    weights = {name: state.read(value, PARAMETER).clone() for name, value in engine.model.named_parameters()}
    return losses, norms, weights


def test_micro_batches_and_ranks_change_neither_loss_nor_clipping_nor_weights():
    (whole,) = run_distributed(updates_of, 1, 8, 0)
    assert min(whole[1]) > 0.2  # clipped
    worst = 0.0
    for world_size, micro_batch_size, stage in ((1, 1, 0), (1, 2, 2), (2, 1, 1), (2, 4, 3), (4, 1, 0), (4, 2, 2)):
        for losses, norms, weights in run_distributed(updates_of, world_size, micro_batch_size, stage):
            assert losses == pytest.approx(whole[0], rel=1e-6)
            assert norms == pytest.approx(whole[1], rel=1e-5)
            difference = max(float((weights[name] - value).abs().max()) for name, value in whole[2].items())
            worst = max(worst, difference)
            assert difference <= 1e-6
    print(f"weights differ by at most {worst:.1e}")  # measured: 1.2e-7
