"""Sparse layers among dense ones, shared experts, many experts, other numbers of choices: all from the config."""

import copy

import pytest
import torch
from distributed import run_distributed
from torch.nn import functional as F

import phi35
from moe import expert_parallel
from moe.layer import SparseMoE
from moe.losses import expert_counts, load_balancing_loss
from phi35 import presets
from phi35.checkpoint.rules import to_disk, to_memory
from phi35.config_io import from_hf_dict, to_hf_dict
from phi35.feed_forward import GatedMLP
from phi35.parameter_count import count_parameters

BASE = presets.get("tiny-phi-3.5-moe").replace(initializer_range=0.1, num_hidden_layers=5, router_type="topk")
EVERY_SECOND = BASE.replace(decoder_sparse_step=2, dense_intermediate_size=160)
SHARED = BASE.replace(num_hidden_layers=2, shared_expert_intermediate_size=48)
MIXED = EVERY_SECOND.replace(shared_expert_intermediate_size=48, num_local_experts=8, num_experts_per_tok=3)
CONFIGS = {
    "every_second": EVERY_SECOND,
    "every_third_sparsemixer": BASE.replace(decoder_sparse_step=3, router_type="sparsemixer"),
    "shared": SHARED,
    "mixed": MIXED,
    "mixed_vision": MIXED.replace(model_type="phi3_v", vision=presets.get("tiny-phi-3.5-vision").vision),
    "not_normalised": BASE.replace(num_hidden_layers=2, norm_topk_prob=False),
}


def random_ids(batch_size, length):
    return torch.randint(1000, (batch_size, length), generator=torch.Generator().manual_seed(0))


def test_every_kth_layer_is_sparse_and_the_others_have_their_own_width():
    model = phi35.create(EVERY_SECOND, seed=0)
    assert EVERY_SECOND.sparse_layers == (1, 3) and BASE.sparse_layers == (0, 1, 2, 3, 4)
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer.mlp, SparseMoE if number in (1, 3) else GatedMLP)
        if isinstance(layer.mlp, GatedMLP):
            assert layer.mlp.down_proj.weight.shape == (64, 160)
        else:
            assert layer.mlp.experts.down_proj.shape == (4, 64, 96)
    output = model(random_ids(2, 7))
    assert len(output.router_outputs) == 2
    assert expert_counts(output.router_outputs).sum(dim=-1).tolist() == [28, 28]
    assert BASE.replace(decoder_sparse_step=2).replace(num_local_experts=16).sparse_layers == (1, 3)


@pytest.mark.parametrize("num_experts, top_k", [(8, 1), (8, 3), (16, 4), (64, 1), (64, 8)])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.filterwarnings("ignore:router_type='topk' with one expert")
def test_layer_equals_a_sum_over_the_chosen_experts_written_out(num_experts, top_k, normalised):
    config = SHARED.replace(num_local_experts=num_experts, num_experts_per_tok=top_k, norm_topk_prob=normalised)
    torch.manual_seed(top_k)
    layer = SparseMoE(config).double().eval()
    hidden_states = torch.randn(2, 9, 64, dtype=torch.float64)
    output, routing = layer(hidden_states)
    expected = torch.zeros_like(hidden_states).view(18, 64)
    for token, value in enumerate(hidden_states.view(18, 64)):
        chances = (layer.router.weight @ value).softmax(dim=-1)
        chosen = sorted(range(num_experts), key=lambda expert, chances=chances: -chances[expert].item())[:top_k]
        assert routing.expert_indices[token].tolist() == chosen
        whole = sum(chances[expert] for expert in chosen) if normalised else 1.0
        for expert in chosen:
            gate, up = (layer.experts.gate_up_proj[expert] @ value).chunk(2)
            expected[token] += chances[expert] / whole * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
        gate, up = (layer.shared_expert.gate_up_proj.weight @ value).chunk(2)
        expected[token] += layer.shared_expert.down_proj.weight @ (F.silu(gate) * up)
    # Measured: at most 7.8e-16 at values up to 1.6.
    torch.testing.assert_close(output.view(18, 64), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_and_checkpoint_names_there_and_back(name, tmp_path):
    config = CONFIGS[name]
    assert from_hf_dict(to_hf_dict(config)) == config.replace(stop_token_ids=config.stop_token_ids)
    model = phi35.create(config, seed=1)
    memory = model.state_dict()
    disk = to_disk(config, memory)
    back = to_memory(config, disk)
    assert set(back) == set(memory) and all(torch.equal(back[key], memory[key]) for key in memory)
    dense = next((i for i in range(config.num_hidden_layers) if not config.is_sparse_layer(i)), None)
    if dense is not None:
        assert f"model.layers.{dense}.mlp.gate_up_proj.weight" in disk
        assert not any(key.startswith(f"model.layers.{dense}.block_sparse_moe") for key in disk)
    sparse = f"model.layers.{config.sparse_layers[0]}."
    if config.shared_expert_intermediate_size:
        fused = memory[sparse + "mlp.shared_expert.gate_up_proj.weight"]
        assert torch.equal(disk[sparse + "block_sparse_moe.shared_expert.w1.weight"], fused[:48])
        assert torch.equal(disk[sparse + "block_sparse_moe.shared_expert.w3.weight"], fused[48:])
        assert sparse + "block_sparse_moe.shared_expert.w2.weight" in disk


def test_save_and_load_keep_config_and_logits(tmp_path):
    model = phi35.create(MIXED, seed=1)
    phi35.save(model, None, tmp_path)
    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        loaded, _ = phi35.load(tmp_path, device="cpu")
    assert loaded.config == MIXED
    assert torch.equal(loaded(random_ids(2, 5)).logits, model(random_ids(2, 5)).logits)


def test_published_models_gain_no_key():
    extra = {"norm_topk_prob", "decoder_sparse_step", "dense_intermediate_size", "shared_expert_intermediate_size"}
    for name in ("phi-3.5-mini", "phi-3.5-moe", "phi-3.5-vision"):
        assert not extra & set(to_hf_dict(presets.get(name)))


def test_active_parameters_count_the_chosen_and_the_shared_experts():
    model = phi35.create(MIXED, device="meta")
    expert, shared, dense = 3 * 64 * 96, 3 * 64 * 48, 3 * 64 * 160
    count = count_parameters(model)
    everything_else = count.total - 2 * (8 * expert + shared + 8 * 64) - 3 * dense
    assert count.active == everything_else + 2 * (3 * expert + shared + 8 * 64) + 3 * dense
    feed_forward = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert everything_else == count.total - feed_forward


def test_training_pass_reaches_every_parameter_and_recomputes_alike():
    gradients = []
    for checkpointing in (False, True):
        model = phi35.create(MIXED, seed=2).train()
        model.gradient_checkpointing = checkpointing
        ids = random_ids(4, 40)
        torch.manual_seed(0)
        output = model(ids, labels=ids)
        (output.loss + 0.1 * load_balancing_loss(output.router_outputs)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


@torch.no_grad()
def test_cached_steps_equal_one_pass():
    model = phi35.create(MIXED, seed=2)
    ids = random_ids(2, 10)
    cache = model.new_cache(2)
    pieces = [model(ids[:, :6], past_key_values=cache).logits]
    pieces += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, 10)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=1e-5)  # measured 2.1e-6


def sharded_step(rank, world_size):
    """Largest differences of loss and gradients between the sharded mixed model and the whole one."""
    whole = phi35.create(MIXED.replace(input_jitter_noise=0.0), seed=2).train()
    sharded = expert_parallel.shard(copy.deepcopy(whole), world_size)
    ids = random_ids(world_size, 12)
    expected = [whole(ids[r : r + 1], labels=ids[r : r + 1]).loss for r in range(world_size)]
    torch.stack(expected).sum().backward()
    loss = sharded(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss
    loss.backward()
    errors = {"loss": (loss - expected[rank]).abs().item()}
    for name, parameter in sharded.named_parameters():
        gradient, reference = parameter.grad, whole.get_parameter(name).grad
        if hasattr(parameter, "expert_shard"):
            first = parameter.expert_shard[0]
            reference = reference[first : first + parameter.shape[0]]
        else:
            torch.distributed.all_reduce(gradient)
        errors[name] = (gradient - reference).abs().max().item()
    return errors, len(expert_parallel.expert_parameters(sharded))


def test_expert_parallelism_takes_dense_layers_and_shared_experts_along():
    for errors, num_sharded in run_distributed(sharded_step, 2):
        assert num_sharded == 4
        assert max(errors.values()) < 1e-6, errors  # measured 4.8e-7, of the loss


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_sparse_step": 6}, "decoder_sparse_step must lie between 1 and num_hidden_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must lie between"),
        ({"dense_intermediate_size": 32}, "needs num_local_experts > 0 and decoder_sparse_step > 1"),
        ({"decoder_sparse_step": 2, "dense_intermediate_size": 0}, "dense_intermediate_size must be positive"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size must be 0"),
        ({"num_local_experts": 0, "decoder_sparse_step": 2}, "this model is dense"),
        ({"num_local_experts": 0, "shared_expert_intermediate_size": 8}, "this model is dense"),
        ({"router_type": "sparsemixer", "norm_topk_prob": False}, "never normalised"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
    ],
)
def test_impossible_mixtures_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BASE.replace(**changes)


def test_one_normalised_expert_warns_that_its_router_cannot_learn():
    with pytest.warns(UserWarning, match="router_type='topk' with one expert"):
        SparseMoE(BASE.replace(num_experts_per_tok=1))
