"""What libraries around transformers ask of a model: configs, losses, embeddings, devices, folders."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

import phi35
from moe.losses import load_balancing_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json")


@pytest.fixture(scope="module", params=PRESETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    wrapped(PRESETS[request.param]).save_pretrained(path)
    return path


def test_a_changed_config_changes_the_model(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.attention_dropout, config.use_cache = 0.25, False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, initializer_range=0.5)
    assert model.causal_lm.model.layers[0].self_attn.dropout == 0.25
    assert (model.config.use_cache, model.causal_lm.config.initializer_range) == (False, 0.5)
    assert model.causal_lm.config.stop_token_ids == phi35.loading.load_config(folder).stop_token_ids
    assert model(IDS).logits is not None and getattr(model(IDS), "cache", None) is None
    config.intermediate_size = 32
    with pytest.raises(ValueError, match="32"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    with pytest.raises(ValueError, match="num_layers"):
        AutoModelForCausalLM.from_pretrained(folder, num_layers=1)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_and_dtypes(folder: Path, device_map) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("would place the model on the GPU")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.bfloat16)
    assert (model.device.type, model.dtype, model.config.dtype) == ("cpu", torch.bfloat16, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="float64").dtype == torch.float64
    with pytest.raises(ValueError, match="sdpa"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")


def test_shards_and_gathered_weights(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in load_file(tmp_path / "doubled" / "model.safetensors").items():
        assert torch.equal(tensor, 2 * stored[name]), name
    with pytest.raises(ValueError, match="does not name this model"):
        model.save_pretrained(tmp_path / "wrong", state_dict={"other": torch.zeros(1)})


def test_published_names_are_taken_as_weights(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    other = AutoModelForCausalLM.from_config(model.config)
    stored = load_file(folder / "model.safetensors")
    halves = [dict(list(stored.items())[::2]), dict(list(stored.items())[1::2])]
    for half in halves:  # experts of one layer in several shards
        left = other.load_state_dict(half, strict=False)
        assert len(left.missing_keys) == len(stored) - len(half) and not left.unexpected_keys
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    other.load_state_dict({name: tensor * 0 for name, tensor in model.state_dict().items()})
    assert not other(IDS).logits.any()
    with pytest.raises(RuntimeError, match="missing"):
        other.load_state_dict(halves[0])
    with pytest.raises(ValueError, match="must be"):
        other.load_state_dict({name: tensor[:1] for name, tensor in stored.items()}, strict=False)


def test_the_loss_of_micro_batches_adds_up_to_the_batchs(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    labels = IDS.clone()
    labels[0, :4] = -100
    count = int((labels[:, 1:] >= 0).sum())
    whole = model(IDS, labels=labels).loss
    parts = [
        model(IDS[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=torch.tensor(count)).loss
        for row in range(2)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-6)
    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert torch.allclose(whole, expected, atol=1e-6)


def test_the_balancing_loss_is_added_as_asked() -> None:
    model = wrapped(PRESETS["phimoe"], router_aux_loss_coef=0.5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    plain = model(IDS, attention_mask=mask, labels=IDS)
    assert plain.aux_loss is None and plain.router_logits is None
    model.config.output_router_logits = True
    output = model(IDS, attention_mask=mask, labels=IDS)
    routing = model.causal_lm(IDS, attention_mask=mask).router_outputs
    assert torch.equal(output.aux_loss, load_balancing_loss(routing, mask)) and output.aux_loss > 1
    assert torch.allclose(output.loss, plain.loss + 0.5 * output.aux_loss)
    assert len(output.router_logits) == 2 and output.router_logits[0].shape == (IDS.numel(), 4)
    half = model(IDS, attention_mask=mask, labels=IDS, num_items_in_batch=24)
    assert torch.allclose(half.loss, output.loss / 2)  # 12 labels of 24
    model.train()(IDS, attention_mask=mask).aux_loss.backward()
    assert model.causal_lm.model.layers[0].mlp.router.weight.grad.abs().max() > 0


def test_packed_samples_keep_to_themselves() -> None:
    model = wrapped(PRESETS["phi3"])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    packed = model(IDS, position_ids=positions, labels=IDS)
    for row, stretches in enumerate(((slice(0, 3), slice(3, 7)), (slice(0, 5), slice(5, 7)))):
        for stretch in stretches:
            alone = model(IDS[row : row + 1, stretch]).logits
            assert torch.allclose(packed.logits[row : row + 1, stretch], alone, atol=2e-5)
    assert torch.isfinite(packed.loss)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    flattened = model(IDS[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=4, max_length_k=4)
    assert torch.equal(flattened.logits, model(IDS[:1], position_ids=positions[:1]).logits)
    with pytest.raises(ValueError, match="attention_mask"):
        model(IDS[:1], cu_seq_lens_q=ends, attention_mask=torch.ones_like(IDS[:1]))
    with pytest.raises(TypeError, match="unexpected"):
        model(IDS, other=1)
    with pytest.raises(ValueError, match="count up from 0"):
        model(IDS, position_ids=positions.clone().index_fill_(1, torch.tensor([6]), 9))


def test_hidden_states_lead_from_the_embedding_to_the_head() -> None:
    model = wrapped(PRESETS["phi3"])
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(states[0], model.get_input_embeddings()(IDS))
    assert torch.equal(model.causal_lm.lm_head(states[-1]), model(IDS).logits)
    with pytest.raises(ValueError, match="output_attentions"):
        model(IDS, output_attentions=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1100, 1060])
def test_the_vocabulary_can_be_resized(size: int, tied: bool, tmp_path: Path) -> None:
    model = wrapped(PRESETS["phi3"], tie_word_embeddings=tied)
    with torch.no_grad():
        before = model(IDS).logits
        torch.manual_seed(1)
        model.resize_token_embeddings(size)
        after = model(IDS).logits
    kept = min(size, 1088)
    assert after.shape[-1] == size == model.config.vocab_size == model.causal_lm.config.vocab_size
    assert torch.allclose(after[..., :kept], before[..., :kept], atol=1e-5)
    head, embedding = model.causal_lm.lm_head, model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3).shape == (2, 10)
    model.causal_lm.train()(IDS, labels=IDS).loss.backward()  # the head still knows the chunked loss
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, after)


def test_a_resized_vocabulary_keeps_factor_divisor_and_masked_ids() -> None:
    model = wrapped("tiny-phi-3-small-8k")
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(1100)
        after = model(IDS).logits
    assert torch.allclose(after[..., :1088], before, atol=1e-5) and before[..., :1064].std() > 0.01
    assert model.get_input_embeddings().factor == 10 and (after[..., 1064:1088] == after.min()).all()


def test_embedding_and_head_can_be_tied_and_untied() -> None:
    model = wrapped(PRESETS["phi3"])
    untied = model(IDS).logits
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.causal_lm.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.allclose(model(IDS).logits, untied) and model.all_tied_weights_keys
    model.config.tie_word_embeddings = False
    model.tie_weights()
    assert model.causal_lm.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.causal_lm.lm_head.weight, model.get_input_embeddings().weight)
    new = torch.nn.Embedding(1088, 64)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


def test_the_image_class_takes_padded_and_packed_crops(tmp_path: Path) -> None:
    wrapped(PRESETS["phi3_v"]).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    batch = picture_batch()
    padded = model(**batch).logits
    counts = 1 + (batch["image_sizes"] // 64).prod(dim=1)
    real = torch.cat([image[:count] for image, count in zip(batch["pixel_values"], counts, strict=True)])
    assert torch.equal(padded, model(**{**batch, "pixel_values": real}).logits)
    with pytest.raises(ValueError, match="one entry an image"):
        model(**{**batch, "image_sizes": batch["image_sizes"][:1]})


def test_experts_are_sampled_in_training_unless_told_otherwise() -> None:
    model = wrapped(PRESETS["phimoe"]).train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.config.router_sampling = False
    model.train()
    chosen = model(IDS, labels=IDS, output_router_logits=True)
    assert torch.equal(chosen.logits, model(IDS).logits) and model.training
    (chosen.loss + chosen.aux_loss).backward()
    assert model.causal_lm.model.layers[0].mlp.router.weight.grad.abs().max() > 0
    assert torch.equal(chosen.logits, model.eval()(IDS).logits)
    model.config.router_sampling = True
    assert not torch.equal(model.train()(IDS).logits, chosen.logits)


def test_a_model_with_pictures_and_experts(tmp_path: Path) -> None:
    changes = {"num_local_experts": 4, "intermediate_size": 32, "router_aux_loss_coef": 0.1}
    model = wrapped(PRESETS["phi3_v"], **changes)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, output_router_logits=True)
    batch = picture_batch()
    output = again(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    assert torch.equal(output.logits, model(**batch).logits) and 1 < output.aux_loss < 4
    answers = again.generate(**batch, max_new_tokens=5)
    assert torch.equal(answers, again.generate(**batch, max_new_tokens=5, use_cache=False))
