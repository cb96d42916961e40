"""One training config: reading, validation, and what DeepSpeed gets of it."""

import json
from pathlib import Path

import pytest

from phi35.training.config import TrainingConfig, read_config
from phi35.training.deepspeed_config import config_fields, handed_over, merge, read_deepspeed_file, to_deepspeed

READY = sorted((Path(__file__).resolve().parents[2] / "deepspeed_configs").glob("*.json"))


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 50\nlearning_rate: 1e-4\nmodel_overrides:\n  num_hidden_layers: 3\n")
    overrides = ["max_steps=70", "model_overrides.intermediate_size=64", "learning_rates.tower=2e-6", "freeze=[router]"]
    config = read_config(file, overrides, {"max_steps": 10, "sequence_length": 32})
    assert (config.max_steps, config.sequence_length, config.learning_rate) == (70, 32, 1e-4)
    assert config.model_overrides == {"num_hidden_layers": 3, "intermediate_size": 64}
    assert config.learning_rates == {"tower": 2e-6} and config.freeze == ("router",)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as caught:
        TrainingConfig(
            schedule="sawtooth", dtype="float16", zero_stage=4, max_steps=0, learning_rate=-1.0, freeze=("head",)
        )
    for part in ("sawtooth", "float16", "zero_stage", "max_steps", "learning_rate", "head"):
        assert part in str(caught.value)


@pytest.mark.parametrize("values", [{"max_steps": "many"}, {"resume": 1}, {"learning_rates": 3}, {"max_steps": True}])
def test_wrong_types_name_the_field(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        TrainingConfig(**values)


def test_unknown_keys_are_named_with_near_ones():
    with pytest.raises(ValueError, match="'steps'.*'lerning_rate'|'lerning_rate'.*'steps'") as caught:
        read_config(None, ["lerning_rate=1", "steps=3"])
    assert "learning_rate" in str(caught.value)


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="decay_steps"):
        TrainingConfig(decay_steps=5)
    with pytest.raises(ValueError, match="decay_steps"):
        TrainingConfig(schedule="wsd")
    with pytest.raises(ValueError, match="selective"):
        TrainingConfig(compile=True, gradient_checkpointing="selective")
    with pytest.raises(ValueError, match="kernels of its own"):
        TrainingConfig(compile=True, kernels="fused")
    with pytest.raises(ValueError, match="optimizer_dtype='bfloat16' needs dtype='bfloat16'"):
        TrainingConfig(optimizer_dtype="bfloat16")
    with pytest.raises(ValueError, match="warmup_steps"):
        TrainingConfig(warmup_steps=200, max_steps=100)


def test_resolve_fills_open_fields():
    resolved = TrainingConfig(global_batch_size=16).resolve(world_size=2, num_experts=4, router_aux_loss_coef=0.01)
    assert (resolved.micro_batch_size, resolved.ep_size, resolved.router_aux_loss_coef) == (8, 2, 0.01)
    assert resolved.is_resolved and resolved.gradient_accumulation_steps(2) == 1
    assert TrainingConfig(zero_stage=3).resolve(world_size=2, num_experts=4).ep_size == 1
    assert TrainingConfig().resolve(world_size=4).ep_size == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_processes_take_the_stage_that_shards_gradients(dtype):
    """Stage 0 where there is one process, which has nobody to shard with, else 2: stage 1 keeps gradients whole."""
    from phi35 import presets
    from phi35.planning.memory import plan_memory

    config = TrainingConfig(dtype=dtype, micro_batch_size=1)
    assert config.resolve(world_size=1).zero_stage == 0
    assert config.replace(offload="optimizer").resolve(world_size=1).zero_stage == 2
    model = presets.get("tiny-phi-3-mini-4k").replace(hidden_size=512, intermediate_size=2048)
    stages = [config.replace(zero_stage=stage).resolve(world_size=4) for stage in (1, 2)]
    first, second = (plan_memory(model, one, 4, bucket_size=1000).peak for one in stages)
    assert config.resolve(world_size=4) == stages[1] and second < 0.9 * first


@pytest.mark.parametrize(
    ("changes", "world_size", "experts", "message"),
    [
        ({"global_batch_size": 6}, 4, 0, "global_batch_size"),
        ({"ep_size": 2}, 2, 0, "dense"),
        ({"ep_size": 3, "global_batch_size": 6}, 3, 16, "must divide"),
        ({"ep_size": 2, "zero_stage": 3}, 2, 4, "zero_stage"),
        ({"ep_size": 2, "compile": True}, 2, 4, "compile=true takes whole layers"),
        ({"zero_stage": 1, "dtype": "bfloat16", "optimizer_dtype": "bfloat16"}, 1, 0, "zero_stage=0"),
        ({"dtype": "bfloat16", "optimizer_dtype": "bfloat16"}, 2, 0, "zero_stage=0"),
        ({"zero_stage": 3, "gradient_checkpointing": "selective"}, 2, 0, "selective"),
    ],
)
def test_what_does_not_fit_the_processes_is_named(changes, world_size, experts, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes).resolve(world_size=world_size, num_experts=experts)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rendered_dict_is_whole_and_accepted_by_deepspeed(stage, dtype):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = TrainingConfig(zero_stage=stage, dtype=dtype, global_batch_size=12, micro_batch_size=3)
    rendered = to_deepspeed(config.resolve(world_size=1), 1)
    assert '"auto"' not in json.dumps(rendered)
    assert rendered["gradient_accumulation_steps"] == 4
    parsed = DeepSpeedConfig(handed_over(rendered))
    assert parsed.zero_config.stage == stage and parsed.train_batch_size == 12
    assert parsed.gradient_clipping == config.gradient_clipping
    assert parsed.bfloat16_config.enabled == (dtype == "bfloat16" and stage > 0)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_files_load_and_agree_with_the_config_they_imply(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    given = read_deepspeed_file(path)
    config = read_config(None, [], config_fields(given))
    world_size = 1
    if "train_batch_size" in given:
        per_rank = given["train_micro_batch_size_per_gpu"] * given["gradient_accumulation_steps"]
        world_size = given["train_batch_size"] // per_rank
        assert world_size * per_rank == given["train_batch_size"]
    merged = merge(to_deepspeed(config.resolve(world_size=world_size), world_size, "cuda"), given)
    if world_size == 1:
        merged = {**merged, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
        parsed = DeepSpeedConfig(merged)
        assert parsed.zero_config.stage == given["zero_optimization"]["stage"]
    assert (
        merged["zero_optimization"]
        == to_deepspeed(config.resolve(world_size=world_size), world_size, "cuda")["zero_optimization"]
    )


def test_there_is_a_ready_file_for_every_stage():
    assert {path.stem for path in READY} >= {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "moe_ep2_zero1"}


def test_a_file_that_contradicts_the_config_names_the_keys(tmp_path):
    rendered = to_deepspeed(TrainingConfig(gradient_clipping=0.5, zero_stage=2).resolve(world_size=1), 1)
    given = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    with pytest.raises(ValueError) as caught:
        merge(rendered, given)
    for key in ("gradient_clipping", "zero_optimization.stage", "bf16"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": "auto"}', "auto"),
        ('{"zero_optimisation": {}}', "zero_optimisation"),
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ('{"zero_optimization": 2}', "zero_optimization must be an object"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "given.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_deepspeed_file(path)


@pytest.mark.parametrize(("overrides", "named"), [(["freeze=[tower"], "freeze="), (["seed: 1=2"], "seed: 1")])
def test_broken_yaml_is_a_mistake_like_others(tmp_path, overrides, named):
    with pytest.raises(ValueError, match=named):
        read_config(None, overrides)
    (tmp_path / "run.yaml").write_text("max_steps: [3\n")
    with pytest.raises(ValueError, match=r"run\.yaml.*not YAML"):
        read_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("rate", [-1.0, "fast", True, float("nan")])
def test_a_parts_learning_rate_must_be_a_number(rate):
    with pytest.raises(ValueError, match=r"learning_rates\.tower"):
        TrainingConfig(learning_rates={"tower": rate})
