"""Weight files that are whole, split, damaged, or not to be trusted."""

import json
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import phi35
from phi35.checkpoint.reader import read_headers
from phi35.checkpoint.writer import parse_size, plan_shards, write_safetensors, write_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    return phi35.create("tiny-phi-3.5-mini", seed=2)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A checkpoint of several shards with an index; never changed by a test."""
    folder = tmp_path_factory.mktemp("sharded")
    phi35.save(model, None, folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to do harm to."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def assert_same_weights(folder, model):
    loaded, _ = phi35.load(folder, device="cpu")
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_with_an_index(saved, model):
    assert len(list(saved.glob("model-0000*-of-00004.safetensors"))) == 4
    assert_same_weights(saved, model)


def test_the_files_are_what_the_library_reads(saved, model):
    index = json.loads((saved / INDEX).read_text())
    stored = {}
    for file in saved.glob("*.safetensors"):
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        stored |= tensors
    assert set(stored) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in stored.values())
    expected = model.state_dict()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_one_file(model, tmp_path):
    phi35.save(model, None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same_weights(tmp_path, model)


def test_complete_shards_without_an_index_are_read_and_said(folder, model):
    (folder / INDEX).unlink()
    with pytest.warns(UserWarning, match="no model.safetensors.index.json; its 4 shards are complete"):
        assert_same_weights(folder, model)


def test_incomplete_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="not one complete set.*model-00004-of-00004"):
        phi35.load(folder, device="cpu")


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 1 of the shards.*model-00002-of-00004.safetensors"):
        phi35.load(folder, device="cpu")


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_cut_off_shard_is_named(folder, kept):
    shard = folder / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model-00002-of-00004.safetensors cannot be read.*damaged or cut off"):
        phi35.load(folder, device="cpu")


def test_a_damaged_header_is_named(folder):
    shard = folder / "model-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[10:20] = b"\xff" * 10
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="model-00001-of-00004.safetensors cannot be read"):
        phi35.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_never_leads_out_of_its_folder(folder, name):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its own folder"):
        phi35.load(folder, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": [1]}', '{"weight_map": {}}'])
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match="is not an index|lists no tensors"):
        phi35.load(folder, device="cpu")


def test_an_index_that_lists_tensors_no_shard_holds(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="shards lack: model.extra.weight in model-00001-of-00004"):
        phi35.load(folder, device="cpu")


def test_a_tensor_in_two_shards(folder):
    first = load_file(folder / "model-00001-of-00004.safetensors")
    last = load_file(folder / "model-00004-of-00004.safetensors")
    name = next(iter(first))
    save_file(last | {name: first[name]}, folder / "model-00004-of-00004.safetensors")
    with pytest.raises(ValueError, match="stands both in .*00001-of-00004.* and in .*00004-of-00004"):
        phi35.load(folder, device="cpu")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


def test_pickled_weights_are_never_opened(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="only pickled weights .pytorch_model.bin.*weights_only=True"):
        phi35.load(folder, device="cpu")


def test_no_weights_at_all(folder):
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no weights: expected model.safetensors"):
        phi35.load(folder, device="cpu")


def test_tensors_that_do_not_fit_are_reported_before_memory_is_taken(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"], config["vocab_size"] = 3, 10**13  # 2.56 PB for the embedding
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        phi35.load(folder, device="cpu")
    message = str(caught.value)
    assert "6 missing: model.layers.2.self_attn.qkv_proj.weight" in message
    assert "2 misshapen" in message and "lm_head.weight has shape [1088, 64], expected [10000000000000, 64]" in message


def test_quantized_tensors_are_refused(folder):
    shard = folder / "model-00001-of-00004.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, shard)
    with pytest.raises(ValueError, match="is stored as I8: only"):
        phi35.load(folder, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_cast_once(saved, model, dtype):
    loaded, _ = phi35.load(saved, device="cpu", dtype=dtype)
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype))


def test_auto_keeps_the_stored_dtype(model, tmp_path):
    phi35.save(phi35.create("tiny-phi-3.5-moe", dtype="bfloat16"), None, tmp_path)
    assert phi35.load(tmp_path, device="cpu", dtype="auto")[0].dtype == torch.bfloat16
    assert phi35.load(tmp_path, device="cpu")[0].dtype == torch.float32


def test_meta_models_read_headers_alone(saved):
    loaded, _ = phi35.load(saved, device="meta")
    assert all(parameter.is_meta for parameter in loaded.parameters())


def test_a_save_replaces_the_one_before(folder):
    other = phi35.create("tiny-phi-3.5-mini", seed=3)
    phi35.save(other, None, folder, max_shard_size="400KB")
    assert_same_weights(folder, other)
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    phi35.save(other, None, folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert_same_weights(folder, other)
    phi35.save(other, None, folder, max_shard_size="300KB")
    assert not (folder / "model.safetensors").exists()
    assert_same_weights(folder, other)


def test_a_save_that_fails_leaves_the_old_files(folder, model):
    other = phi35.create("tiny-phi-3.5-mini", seed=9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (290_000, hard))  # the second shard is longer than that
    try:
        with pytest.raises(OSError):
            phi35.save(other, None, folder, max_shard_size="300KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_weights(folder, model)
    assert not list(folder.glob(".*.part"))


def test_writing_refuses_what_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it is a file"):
        phi35.save(model, None, tmp_path / "file")
    with pytest.raises(ValueError, match="max_shard_size 'large' is not a size"):
        phi35.save(model, None, tmp_path / "new", max_shard_size="large")
    with pytest.raises(ValueError, match="meta device"):
        phi35.save(phi35.create("tiny-phi-3.5-mini", device="meta"), None, tmp_path / "new")
    with pytest.raises(ValueError, match="cannot write these dtypes"):
        write_safetensors(tmp_path / "x", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "new").exists() and not (tmp_path / "x").exists()


def test_mixed_dtypes_views_scalars_and_empty_tensors(tmp_path):
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "transposed": whole.T,
        "window": whole[1:, 1:3],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "long": torch.tensor([2**40]),
    }
    write_safetensors(tmp_path / "mixed.safetensors", tensors, {"format": "pt"})
    back = load_file(tmp_path / "mixed.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor)


def test_shards_are_filled_in_order_up_to_the_limit(tmp_path):
    tensors = {name: torch.zeros(size) for name, size in (("a", 10), ("b", 10), ("c", 30), ("d", 5), ("e", 15))}
    assert plan_shards(tensors, 80) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(tensors, 10**6) == [["a", "b", "c", "d", "e"]]
    files = write_weights(tmp_path, tensors, 80)
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(read_headers(tmp_path)) == set("abcde")


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("300MiB", 300 * 2**20), (1000, 1000), ("1.5 kb", 1500), ("7", 7)]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1", "0", 0, "5 bananas", "1e9x", None])
def test_no_sizes(size):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(size)
