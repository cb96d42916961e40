"""Samples of 131,072 tokens: two processes equal one, and nothing of the size T x V or T x T is ever held."""

import resource

import pytest
import torch
from distributed import run_distributed

from phi35.config import ModelConfig, RopeScaling

VOCABULARY = 8192


def config_of(length):
    half = 8
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        original_max_position_embeddings=length // 32,
        rope_scaling=RopeScaling(
            short_factor=tuple(1.0 + 0.05 * i for i in range(half)),
            long_factor=tuple(1.5 + 3.0 * i for i in range(half)),
        ),
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=1,
        stop_token_ids=(1,),
    )


def one_pass(rank, world_size, length):
    """Loss share, gradients, and by how much the process's memory rose above that of a short pass, in bytes."""
    from phi35.model import CausalLM
    from phi35.sequence_parallel import SequenceParallel

    config = config_of(length)
    model = CausalLM(config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    model.gradient_checkpointing = True
    short = torch.arange(4 * world_size)[None] % VOCABULARY
    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    if world_size > 1:
        model.model.sequence_parallel = SequenceParallel(torch.distributed.group.WORLD)
    before, loss = 0, torch.zeros(())
    for tokens in (short, ids):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model.zero_grad()
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        share = 1.0
        if model.model.sequence_parallel is not None:
            total = tokens.shape[1] - 1
            inputs, targets = (model.model.sequence_parallel.local(one) for one in (tokens, targets))
            share = int((targets >= 0).sum()) / total
        else:
            inputs = tokens
        loss = model(inputs, targets=targets, sequence_lengths=torch.tensor([[tokens.shape[1]]])).loss * share
        loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return float(loss.detach()), gradients, (after - before) * 1024


def compare(length, limit):
    (alone,) = run_distributed(one_pass, 1, length, timeout=3000)
    shared = run_distributed(one_pass, 2, length, timeout=3000)
    loss = sum(one for one, _, _ in shared)
    apart = {name: sum(gradients[name] for _, gradients, _ in shared) - expected for name, expected in alone[1].items()}
    worst = max(float(difference.abs().max()) for difference in apart.values())
    relative = max(float(difference.norm() / alone[1][name].norm()) for name, difference in apart.items())
    memory = [one[2] for one in (alone, *shared)]
    print(
        f"{length} tokens: loss {alone[0]:.6f}, on two processes {abs(loss - alone[0]):.1e} apart; gradients at most "
        f"{worst:.1e} ({relative:.1e} of a tensor's norm); memory {[round(one / 2**20) for one in memory]} MiB above a "
        "short pass"
    )
    assert loss == pytest.approx(alone[0], rel=1e-6)
    assert worst <= 1e-6 and relative <= 1e-5
    assert max(memory) < limit


def test_8192_tokens_on_two_processes_equal_one():
    # Logits alone would take 256 MiB, attention weights 512 MiB: at this length they may come in one chunk.
    compare(8192, 2**30)


@pytest.mark.long
def test_131072_tokens_on_two_processes_equal_one_in_bounded_memory():
    # Float32 logits would take 4 GiB, as much again their gradient; attention weights 128 GiB.
    compare(131_072, 1.25 * 2**30)
