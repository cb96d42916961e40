"""Published names and the model's own, both ways."""

import pytest
import torch

import phi35
from phi35 import presets
from phi35.checkpoint.rules import CheckpointPlan, Rule, memory_shapes, rules_for, to_disk, to_memory
from phi35.config_io import from_hf_dict, to_generation_dict, to_hf_dict
from phi35.meta_model import meta_model
from phi35.parameter_count import count_parameters

KINDS = ("weight", "bias")
TOWER = "model.vision_embed_tokens.img_processor."
CLIP = TOWER + "vision_model."
TWINS = ["tiny-phi-3-medium-4k", "tiny-phi-3-small-8k", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision"]


def combined_config():
    """A model that fills both slots."""
    return presets.get("tiny-phi-3.5-moe").replace(vision=presets.get("tiny-phi-3.5-vision").vision)


def state_of(config):
    return phi35.create(config, seed=1).state_dict()


@pytest.mark.parametrize("name", [*TWINS, "combined", "tied"])
def test_there_and_back_changes_no_bit(name):
    configs = {
        "combined": combined_config(),
        "tied": presets.get("tiny-phi-3.5-mini").replace(tie_word_embeddings=True),
    }
    config = configs.get(name) or presets.get(name)
    memory = state_of(config)
    disk = to_disk(config, memory)
    back = to_memory(config, disk)
    assert set(back) == set(memory)
    assert all(torch.equal(back[key], memory[key]) for key in memory)
    again = to_disk(config, back)
    assert list(again) == list(disk) and all(torch.equal(again[key], disk[key]) for key in disk)


def test_dense_names_are_the_published_ones():
    disk = to_disk(presets.get("tiny-phi-3.5-mini"), state_of(presets.get("tiny-phi-3.5-mini")))
    layer = "model.layers.1."
    assert {name for name in disk if name.startswith(layer)} == {
        layer + "self_attn.qkv_proj.weight",
        layer + "self_attn.o_proj.weight",
        layer + "mlp.gate_up_proj.weight",
        layer + "mlp.down_proj.weight",
        layer + "input_layernorm.weight",
        layer + "post_attention_layernorm.weight",
    }
    assert {name for name in disk if not name.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_sparse_names_and_the_order_of_their_parts():
    config = presets.get("tiny-phi-3.5-moe")
    memory = state_of(config)
    disk = to_disk(config, memory)
    layer = "model.layers.1."
    experts = {f"{layer}block_sparse_moe.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2", "w3")}
    projections = {f"{layer}self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    norms = {
        f"{layer}{norm}.{kind}"
        for norm in ("input_layernorm", "post_attention_layernorm")
        for kind in ("weight", "bias")
    }
    router = {layer + "block_sparse_moe.gate.weight"}
    assert {name for name in disk if name.startswith(layer)} == experts | projections | norms | router
    assert {"lm_head.weight", "lm_head.bias", "model.norm.bias"} <= set(disk)

    # By hand: the gate is the first half, w3 the second; 64 query rows, then 32 key rows, then 32 value rows.
    fused = memory[layer + "mlp.experts.gate_up_proj"]
    assert torch.equal(disk[layer + "block_sparse_moe.experts.2.w1.weight"], fused[2, :96])
    assert torch.equal(disk[layer + "block_sparse_moe.experts.2.w3.weight"], fused[2, 96:])
    assert torch.equal(disk[layer + "block_sparse_moe.experts.3.w2.weight"], memory[layer + "mlp.experts.down_proj"][3])
    qkv = memory[layer + "self_attn.qkv_proj.weight"]
    assert torch.equal(disk[layer + "self_attn.q_proj.weight"], qkv[:64])
    assert torch.equal(disk[layer + "self_attn.k_proj.weight"], qkv[64:96])
    assert torch.equal(disk[layer + "self_attn.v_proj.weight"], qkv[96:])


def test_phi_3_smalls_names_and_the_order_of_their_rows():
    config = presets.get("tiny-phi-3-small-8k")
    memory = state_of(config)
    for name, tensor in memory.items():
        if name.endswith("bias"):
            tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    disk = to_disk(config, memory)
    layer = "model.layers.1."
    modules = "self_attn.query_key_value self_attn.dense mlp.up_proj mlp.down_proj input_layernorm"
    assert {name for name in disk if name.startswith(layer)} == {
        f"{layer}{module}.{kind}" for module in (*modules.split(), "post_attention_layernorm") for kind in KINDS
    }
    assert {name for name in disk if not name.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.final_layernorm.weight",
        "model.final_layernorm.bias",
    }
    # By hand, heads of 16 rows: group 1 has query heads 2 and 3, key head 1, value head 1.
    for kind in KINDS:
        fused, grouped = memory[f"{layer}self_attn.qkv_proj.{kind}"], disk[f"{layer}self_attn.query_key_value.{kind}"]
        assert torch.equal(grouped[64:96], fused[32:64])
        assert torch.equal(grouped[96:112], fused[64 + 16 : 64 + 32])
        assert torch.equal(grouped[112:128], fused[96 + 16 : 96 + 32])
        both, turns = memory[f"{layer}mlp.gate_up_proj.{kind}"], disk[f"{layer}mlp.up_proj.{kind}"]
        assert torch.equal(turns[0::2], both[:128]) and torch.equal(turns[1::2], both[128:])


@pytest.mark.parametrize(
    "name",
    [
        "phi-3-small-8k",
        "phi-3-small-128k",
        "phi-3-medium-4k",
        "phi-3-medium-128k",
        "phi-3-vision-128k",
        "phi-3.5-mini",
        "phi-3.5-moe",
        "phi-3.5-vision",
    ],
)
def test_full_size_models_go_to_disk_names_and_back_without_memory(name):
    """Every name and shape, there and back, on the meta device."""
    config = presets.get(name)
    memory = meta_model(config).state_dict()
    disk = to_disk(config, memory)
    back = to_memory(config, disk)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in memory.items()}
    assert all(tensor.is_meta for tensor in (*disk.values(), *back.values()))
    assert sum(tensor.numel() for tensor in disk.values()) == count_parameters(config).total
    assert from_hf_dict(to_hf_dict(config), to_generation_dict(config)) == config.replace(experts_backend="auto")


def test_tower_names_are_those_of_clip():
    config = presets.get("tiny-phi-3.5-vision")
    memory = state_of(config)
    disk = to_disk(config, memory)
    block = {
        f"{CLIP}encoder.layers.2.{module}.{kind}"
        for module in "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj layer_norm1 layer_norm2 "
        "mlp.fc1 mlp.fc2".split()
        for kind in ("weight", "bias")
    }
    ends = {f"{CLIP}{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")}
    embeddings = {
        CLIP + "embeddings." + name
        for name in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    }
    tower = {name for name in disk if name.startswith(TOWER)}
    assert {name for name in tower if ".layers.2." in name or ".layers." not in name} == block | ends | embeddings
    assert {name for name in disk if name.startswith("model.vision_embed_tokens.") and name not in tower} == {
        f"model.vision_embed_tokens.{name}"
        for name in (
            "glb_GN",
            "sub_GN",
            "img_projection.0.weight",
            "img_projection.0.bias",
            "img_projection.2.weight",
            "img_projection.2.bias",
        )
    }
    assert disk[CLIP + "embeddings.class_embedding"].shape == (64,)
    assert torch.equal(disk[CLIP + "embeddings.class_embedding"], memory[TOWER + "cls_token"][0, 0])
    assert torch.equal(disk[CLIP + "embeddings.position_embedding.weight"], memory[TOWER + "pos_embed"][0])
    assert torch.equal(
        disk[CLIP + "encoder.layers.0.self_attn.k_proj.bias"], memory[TOWER + "blocks.0.attn.qkv.bias"][64:128]
    )


def test_full_size_names_count_as_published():
    # 32 layers of 8 + 4 tensors and 16 experts of 3, a router each, and the ends: what the published index lists.
    config = presets.get("phi-3.5-moe")
    plan = CheckpointPlan(config)
    assert len(plan.written()) == 32 * (8 + 4 + 16 * 3 + 1) + 1 + 2 + 2
    assert len(CheckpointPlan(presets.get("phi-3.5-mini")).written()) == 32 * 6 + 3


def test_saving_takes_views_not_copies():
    config = presets.get("tiny-phi-3.5-moe")
    memory = state_of(config)
    disk = to_disk(config, memory)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    memory[name][1, 5] = 7.0
    assert (disk["model.layers.0.block_sparse_moe.experts.1.w1.weight"][5] == 7.0).all()


@pytest.mark.parametrize("name", TWINS)
def test_memory_names_are_read_as_well(name):
    config = presets.get(name)
    memory = state_of(config)
    back = to_memory(config, memory)
    assert all(torch.equal(back[key], memory[key]) for key in memory)


def test_everything_wrong_is_reported_at_once():
    config = presets.get("tiny-phi-3.5-moe")
    disk = dict(to_disk(config, state_of(config)))
    del disk["model.layers.0.block_sparse_moe.experts.3.w3.weight"]
    del disk["model.norm.bias"]
    disk["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    disk["lm_head.weight"] = torch.zeros(32064, 64)
    disk["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(64, 64)
    with pytest.raises(ValueError) as caught:
        to_memory(config, disk)
    message = str(caught.value)
    assert "2 missing: model.layers.0.block_sparse_moe.experts.3.w3.weight, model.norm.bias" in message
    assert "1 unknown: model.layers.7.self_attn.q_proj.weight" in message
    assert "2 misshapen" in message
    assert "lm_head.weight has shape [32064, 64], expected [1088, 64]" in message
    assert "model.layers.1.self_attn.k_proj.weight has shape [64, 64], expected [32, 64]" in message


def test_a_state_of_another_model_is_not_written():
    config = presets.get("tiny-phi-3.5-moe")
    memory = dict(state_of(config))
    name = "model.layers.0.mlp.experts.down_proj"
    memory[name] = memory[name][:2]  # what one of two expert-parallel ranks holds
    memory["extra"] = memory.pop("lm_head.bias")
    with pytest.raises(ValueError) as caught:
        to_disk(config, memory)
    assert f"{name} has shape [2, 64, 96], expected [4, 64, 96]" in str(caught.value)
    assert "missing lm_head.bias" in str(caught.value) and "unknown extra" in str(caught.value)


def test_buffers_of_older_checkpoints_are_left_out():
    config = presets.get("tiny-phi-3.5-vision")
    memory = state_of(config)
    disk = dict(to_disk(config, memory))
    disk["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    disk[CLIP + "embeddings.position_ids"] = torch.arange(65)[None]
    back = to_memory(config, disk)
    assert all(torch.equal(back[key], memory[key]) for key in memory)


def test_the_vision_files_second_name_of_the_embedding():
    config = presets.get("tiny-phi-3.5-vision")
    disk = dict(to_disk(config, state_of(config)))
    second = "model.vision_embed_tokens.wte.weight"
    embedding = disk["model.embed_tokens.weight"]
    disk[second] = embedding.clone()
    assert torch.equal(to_memory(config, disk)["model.embed_tokens.weight"], embedding)
    del disk["model.embed_tokens.weight"]
    assert torch.equal(to_memory(config, disk)["model.embed_tokens.weight"], embedding)
    disk["model.embed_tokens.weight"] = embedding + 1
    with pytest.raises(ValueError, match="twice with different values"):
        to_memory(config, disk)


def test_a_tied_head_is_written_once_and_read_either_way():
    config = presets.get("tiny-phi-3.5-mini").replace(tie_word_embeddings=True)
    memory = state_of(config)
    disk = dict(to_disk(config, memory))
    assert "lm_head.weight" not in disk
    disk["lm_head.weight"] = disk["model.embed_tokens.weight"].clone()
    back = to_memory(config, disk)
    assert back["lm_head.weight"] is back["model.embed_tokens.weight"]
    disk["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        to_memory(config, disk)


def test_transposed_parts_are_placed_and_taken_back():
    rules = (
        Rule(memory="both.{layer}", disk=("first.{layer}", "second.{layer}"), concat_dim=1, transpose=True),
        Rule(memory="both.{layer}", disk=("whole.{layer}",), leading_ones=0),
    )
    plan = CheckpointPlan(presets.get("tiny-phi-3.5-mini"), {"both.3": (4, 6)}, rules)
    whole = torch.arange(24.0).reshape(4, 6)
    disk = {placement.disk_name: placement.take(whole) for placement in plan.written()}
    assert torch.equal(disk["first.3"], whole[:, :3].T) and torch.equal(disk["second.3"], whole[:, 3:].T)
    target = torch.zeros(4, 6)
    for placement in plan.match({name: tuple(tensor.shape) for name, tensor in disk.items()}).load:
        placement.put(target, disk[placement.disk_name])
    assert torch.equal(target, whole)
    assert [p.disk_name for p in plan.match({"whole.3": (4, 6)}).load] == ["whole.3"]
    with pytest.raises(ValueError, match="1 missing: second.3"):
        plan.match({"first.3": (3, 4)})


def test_parts_that_do_not_add_up_are_an_error():
    rules = (Rule(memory="both", disk=("first", "second"), sizes=lambda config: (3, 4)),)
    with pytest.raises(ValueError, match="both has size 6 along dim 0, its parts add up to 7"):
        CheckpointPlan(presets.get("tiny-phi-3.5-mini"), {"both": (6, 2)}, rules)


def test_every_tensor_of_a_model_has_a_rule():
    config = combined_config()
    plan = CheckpointPlan(config)
    assert set(plan.spellings) == set(memory_shapes(config))
    covered = {name: 0 for name in plan.shapes}
    for placement in plan.written():
        size = 1
        for length in plan.disk_shape(placement):
            size *= length
        covered[placement.memory_name] += size
    assert covered == {name: torch.Size(shape).numel() for name, shape in plan.shapes.items()}
    assert rules_for(config)[-1].memory == "{rest}"
