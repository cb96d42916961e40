"""load and save of whole folders, hub ids, and the commands over them."""

import json
import re

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import phi35
from phi35 import presets
from phi35.api import SMALL_MODEL
from phi35.loading import load_processor
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer

FAMILIES = ["tiny-phi-3-medium-128k", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision", "combined", "tied"]


def model_of(family, **options):
    if family == "combined":
        vision = presets.get("tiny-phi-3.5-vision").vision
        return phi35.create("tiny-phi-3.5-moe", seed=4, vision=vision, model_type="phi3_v", **options)
    if family == "tied":
        return phi35.create("tiny-phi-3.5-mini", seed=4, tie_word_embeddings=True, **options)
    return phi35.create(family, seed=4, **options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_save_load_changes_no_byte(family, dtype, tmp_path):
    model = model_of(family, dtype=dtype)
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    phi35.save(model, processor, tmp_path / "first", max_shard_size="250KB")
    loaded, its_processor = phi35.load(tmp_path / "first", device="cpu", dtype="auto")
    assert loaded.config == model.config and not loaded.training
    expected, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == model.dtype for name in found)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (family == "tied")
    prompt = "<|user|>\nWhich shape is it?<|end|>\n<|assistant|>\n"
    assert torch.equal(its_processor(prompt)["input_ids"], processor(prompt)["input_ids"])
    phi35.save(loaded, its_processor, tmp_path / "second", max_shard_size="250KB")
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_a_frozen_tensor_stays_frozen_and_a_loaded_model_trains(tmp_path):
    phi35.save(model_of("tiny-phi-3.5-vision"), None, tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer.json .*: the model comes without a processor"):
        model, processor = phi35.load(str(tmp_path), device="cpu")
    assert processor is None
    fresh = model_of("tiny-phi-3.5-vision")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if p.requires_grad
    }
    ids = torch.randint(3, 1000, (2, 6))
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.qkv_proj.weight.grad.abs().max() > 0


def test_a_save_over_another_programs_files_leaves_none_of_its_templates(tmp_path):
    model = model_of("tiny-phi-3.5-moe")
    (tmp_path / "chat_template.jinja").write_text("a template of an earlier save")
    processor = Processor(Tokenizer.from_folder(SMALL_MODEL), model.config)
    phi35.save(model, processor, tmp_path)
    turn = [{"role": "user", "content": "Hi"}]
    found = phi35.load(tmp_path, device="cpu")[1].apply_chat_template(turn)
    assert found == processor.apply_chat_template(turn) != "a template of an earlier save"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[1]", b'{"a": ', b"\xff"])
def test_damaged_json_files_are_named(file, content, tmp_path):
    model = model_of("tiny-phi-3.5-moe")
    phi35.save(model, load_processor(SMALL_MODEL, model.config), tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} (is not valid JSON|must hold a JSON object)"):
        phi35.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_is_no_name_at_all_is_refused(name):
    with pytest.raises(ValueError, match="expected a folder or a hub id"):
        phi35.load(name)


def test_save_wants_its_arguments_in_order(tmp_path):
    model = model_of("tied")
    with pytest.raises(ValueError, match=r"model, processor, folder.*got \(CausalLM, PosixPath, NoneType\)"):
        phi35.save(model, tmp_path, None)


def test_names_that_are_no_folder_are_told_apart(tmp_path):
    (tmp_path / "file.txt").write_text("")
    for name, message in (
        ("phi-3.5-mini", "is a preset, a config without weights: phi35.create"),
        ("./nowhere", "folder './nowhere' does not exist, and it is not a hub id"),
        (tmp_path / "nowhere", "does not exist"),
        ("no where/at all", "does not exist, and it is not a hub id"),
        ("nowhere", "does not exist"),
        (tmp_path / "file.txt", "is a file: give the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            phi35.load(name)


def test_without_a_network_a_hub_id_says_how_to_go_on():
    # HF_HUB_OFFLINE is set for all tests: the client refuses to connect.
    with pytest.raises(OSError, match="copy the checkpoint folder to this machine and give its path"):
        phi35.load("microsoft/Phi-3.5-mini-instruct-that-nobody-has-cached")


def test_folders_without_a_usable_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json: expected a folder in Hugging Face form"):
        phi35.load(tmp_path)
    for text, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            phi35.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"), [({"device": "tpu9"}, "unknown device"), ({"dtype": "float8"}, "unknown dtype 'float8'")]
)
def test_device_and_dtype_are_checked_first(options, message):
    with pytest.raises(ValueError, match=message):
        phi35.load("microsoft/Phi-3.5-mini-instruct", **options)


def run(command, *arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_convert_changes_dtype_and_sharding(tmp_path):
    from phi35.cli.convert import convert

    model = model_of("tiny-phi-3.5-moe")
    phi35.save(model, load_processor(SMALL_MODEL, model.config), tmp_path / "source")
    result = run(convert, tmp_path / "source", tmp_path / "target", "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert result.exit_code == 0 and re.search(r"4 weight files, [\d,]+ bytes, bfloat16", result.output)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    converted, processor = phi35.load(tmp_path / "target", device="cpu", dtype="auto")
    assert processor is not None
    expected = model.state_dict()
    assert all(torch.equal(t, expected[name].bfloat16()) for name, t in converted.state_dict().items())
    with pytest.raises(ValueError, match="is the source itself"):
        run(convert, tmp_path / "source", tmp_path / "source")


def test_convert_brings_clip_weights_into_the_tower(tmp_path):
    pytest.importorskip("open_clip")
    from open_clip.transformer import VisionTransformer

    from phi35.cli.convert import convert

    model = model_of("tiny-phi-3.5-vision")
    phi35.save(model, None, tmp_path / "source")
    vision = model.config.vision
    clip = VisionTransformer(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
        output_dim=32,
    ).state_dict()
    save_file({f"visual.{name}": tensor for name, tensor in clip.items()}, tmp_path / "clip.safetensors")
    with pytest.warns(UserWarning, match="without a processor"):
        result = run(convert, tmp_path / "source", tmp_path / "target", "--open-clip", tmp_path / "clip.safetensors")
    assert "tensors from open_clip weights" in result.output
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "target"))
    prefix = "model.vision_embed_tokens.img_processor.vision_model."
    assert torch.equal(after[prefix + "embeddings.patch_embedding.weight"], clip["conv1.weight"])
    keys = clip["transformer.resblocks.1.attn.in_proj_weight"][64:128]
    assert torch.equal(after[prefix + "encoder.layers.1.self_attn.k_proj.weight"], keys)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(prefix) for name in changed)
    phi35.save(model_of("tied"), None, tmp_path / "text")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="tower|vision"):
        run(convert, tmp_path / "text", tmp_path / "x", "--open-clip", tmp_path / "clip.safetensors")


def test_doctor_names_packages_devices_and_backends():
    from phi35.cli.doctor import doctor

    result = run(doctor)
    assert result.exit_code == 0
    for title in ("Packages", "Devices", "Expert backends", "Compilers", "Default model"):
        assert f"\n{title}\n" in "\n" + result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    assert torch.__version__.split("+")[0] in lines["torch"] and lines["torch"].endswith("ok")
    assert "can run" in lines["loop"]
    assert "cannot run:" in lines["megablocks"] or "can run" in lines["megablocks"]
    if not torch.cuda.is_available():
        assert "none: torch is" in lines["cuda"]


def test_doctor_says_what_is_missing(monkeypatch, tmp_path):
    from phi35.cli.doctor import doctor

    monkeypatch.setenv("PATH", str(tmp_path))
    states = {
        "nonsense": "MISSING: neither a folder nor a hub id",
        "some/folder": "no folder here: taken as a hub id",
        str(tmp_path): "a folder without config.json",
        str(SMALL_MODEL): "a model folder",
    }
    for name, state in states.items():
        monkeypatch.setenv("PHI35_MODEL", name)
        output = run(doctor).output
        assert f"PHI35_MODEL  {name}  {state}\n" in output
    assert "not on the PATH; needed for building MegaBlocks" in output
