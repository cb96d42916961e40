"""Folders of full-size models: every published name and shape, in files with headers and holes in place of numbers."""

import json
import os

import pytest
import torch

import phi35
from phi35 import presets
from phi35.checkpoint.rules import CheckpointPlan
from phi35.checkpoint.writer import plan_shards, write_json
from phi35.config_io import to_generation_dict, to_hf_dict
from phi35.parameter_count import count_parameters

LARGE = ["phi-3-small-8k", "phi-3-small-128k", "phi-3-medium-4k", "phi-3-medium-128k", "phi-3-vision-128k"]


def write_hollow(config, folder, num_bytes=5 * 10**9):
    """A checkpoint in shards whose numbers are holes: it takes no room on the disk."""
    plan = CheckpointPlan(config)
    tensors = {
        placement.disk_name: torch.empty(plan.disk_shape(placement), dtype=torch.bfloat16, device="meta")
        for placement in plan.written()
    }
    shards = plan_shards(tensors, num_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        header, end = {}, 0
        for name in names:
            start, end = end, end + 2 * tensors[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", to_hf_dict(config))
    write_json(folder / "generation_config.json", to_generation_dict(config))
    return len(files), len(tensors)


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
@pytest.mark.parametrize("name", LARGE)
def test_a_full_size_folder_loads_on_the_meta_device(name, tmp_path):
    config = presets.get(name)
    num_files, num_tensors = write_hollow(config, tmp_path)
    assert num_files > 1
    model, _ = phi35.load(tmp_path, device="meta", dtype="auto")
    assert model.config == config and all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total
    assert next(model.parameters()).dtype == torch.bfloat16
    layers = {"phi-3-small": 12, "phi-3-medium": 6, "phi-3-vision": 6}
    per_layer = next(count for prefix, count in layers.items() if name.startswith(prefix))
    assert num_tensors >= config.num_hidden_layers * per_layer + 3


def test_a_full_size_folder_that_lacks_a_tensor_is_refused(tmp_path):
    config = presets.get("phi-3-small-8k")
    write_hollow(config.replace(num_hidden_layers=31), tmp_path)
    write_json(tmp_path / "config.json", to_hf_dict(config))
    with pytest.raises(ValueError, match="12 missing: model.layers.31.self_attn.query_key_value.weight"):
        phi35.load(tmp_path, device="meta")
