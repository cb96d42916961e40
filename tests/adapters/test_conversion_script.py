"""scripts/convert_adapter.py: forms of an adapter, and a checkpoint with it merged in."""

import importlib.util
from pathlib import Path

import pytest
import torch
from adapted_models import IDS, adapted

import phi35
from phi35.adapters.config import AdapterConfig
from phi35.adapters.files import load_adapter, save_adapter
from phi35.adapters.inject import is_adapter

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_adapter.py"


@pytest.fixture
def convert(monkeypatch):
    spec = importlib.util.spec_from_file_location("convert_adapter", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert_adapter.py", *map(str, arguments)])
        return module.main()

    return run


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiny-phi-3.5-moe", {}), ("tiny-phi-3.5-mini", {"dora": True}), ("tiny-phi-3-small-8k", {"dora": True})],
)
def test_forms_and_the_merged_checkpoint(convert, name, options, tmp_path, capsys):
    places = ("attention", "experts", "router") if "moe" in name else ("attention", "feed_forward")
    model = adapted(name, places, **options)
    for parameter_name, parameter in model.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data *= 1.1
    tensors = {key: value for key, value in model.named_parameters() if is_adapter(key)}
    save_adapter(tmp_path / "own", tensors, AdapterConfig(rank=4, alpha=8, targets=places, **options), model.config)
    phi35.save(phi35.create(name, seed=0), None, tmp_path / "base")
    with torch.no_grad():
        expected = model(IDS).logits
        assert convert(tmp_path / "own", tmp_path / "published", "--model", name, "--form", "published") == 0
        reloaded = phi35.create(name, seed=0)
        load_adapter(reloaded, tmp_path / "published")
        assert torch.equal(reloaded(IDS).logits, expected)
        command = (tmp_path / "published", tmp_path / "merged", "--model", tmp_path / "base", "--form", "merged")
        assert convert(*command) == 0
        merged = phi35.load(tmp_path / "merged", device="cpu", dtype="float32")[0]
        torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-6, rtol=0)  # measured 3e-7
    assert convert(tmp_path / "own", tmp_path / "base", "--model", tmp_path / "base", "--form", "merged") == 2
    assert "source itself" in capsys.readouterr().out
