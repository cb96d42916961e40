"""The Auto classes of transformers give this package's models, with its weights, logits and answers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import phi35

PRESETS = {
    "phi3": "tiny-phi-3.5-mini",
    "phi3small": "tiny-phi-3-small-8k",
    "phimoe": "tiny-phi-3.5-moe",
    "phi3_v": "tiny-phi-3.5-vision",
}
IDS = torch.tensor([[5, 9, 4, 17, 3, 8, 30], [7, 1, 6, 2, 11, 12, 13]])


@pytest.fixture(scope="module", autouse=True)
def registration() -> Iterator[None]:
    """Registers for this file alone: other tests of the process mean transformers' own classes."""
    tables = (CONFIG_MAPPING._extra_content, AutoModelForCausalLM._model_mapping._extra_content)
    before = [dict(table) for table in tables]
    phi35.interop.register()
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture(params=PRESETS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    model = phi35.create(PRESETS[request.param], seed=3)
    with torch.no_grad():
        tied = model.config.tie_word_embeddings  # then the last token tends to be the likeliest next one
        for parameter in model.parameters():
            parameter.mul_(10.0 if tied else 3.0)  # so that the likeliest next token differs from step to step
    phi35.save(model, None, path)
    return path


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
def test_logits_and_loss_equal_the_loaded_models(folder: Path) -> None:
    ours, _ = phi35.load(folder, device="cpu", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).model_config.hidden_size == ours.config.hidden_size
    assert type(theirs).__module__ == "phi35.interop.modeling" and not theirs.training
    with torch.no_grad():
        expected, got = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    assert torch.equal(expected.logits, got.logits) and torch.equal(expected.loss, got.loss)


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_equals_ours(folder: Path, padded: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :3] = 0
    theirs = model.generate(IDS, attention_mask=mask, max_new_tokens=12, do_sample=False)
    ours = model.causal_lm.generate(IDS, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(theirs, ours)
    assert len(set(theirs[0, IDS.shape[1] :].tolist())) > 2
    assert torch.equal(model.generate(IDS, attention_mask=mask, max_new_tokens=12, use_cache=False), ours)


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
def test_saving_writes_the_same_folder(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert "phi35" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.filterwarnings("ignore:.*no tokenizer.json")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradient(folder: Path, reentrant: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert bool(model.causal_lm.gradient_checkpointing) == enabled
        model.zero_grad()
        torch.manual_seed(1)
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)
    model.gradient_checkpointing_disable()
    assert not (model.causal_lm.gradient_checkpointing)


def test_what_is_not_supported_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="cuda:98"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"causal_lm.model": 98, "causal_lm.lm_head": 99})
    with pytest.raises(ValueError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"bits": 4})


def test_importing_brings_no_transformers() -> None:
    code = "import sys, phi35; phi35.interop; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
