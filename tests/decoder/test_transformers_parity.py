"""The dense decoder equals transformers' ``Phi3ForCausalLM`` where that is right.

Measured on CPU, torch 2.14, transformers 5.23: every logit of the unpadded cases is equal to the bit; padded
rows differ by at most 2e-6 at a standard deviation of 0.8.
"""

import pytest
import torch
from tiny_configs import longrope_config
from transformers_models import phi3_pair, tolerance

from phi35.config import ModelConfig

WINDOWS = [None, 7, 262144]


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 150, shape, generator=torch.Generator().manual_seed(seed))


def dense_config(window: int | None, original: int = 4096) -> ModelConfig:
    return longrope_config(original, sliding_window=window)


def report(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    error = float((ours - theirs).abs().max())
    print(f"{name}: max abs error {error:.2e}, tolerance {tolerance(theirs):.2e}, logit std {float(theirs.std()):.3f}")
    return error


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 33, 4095, 4096, 4097, 4200])
def test_logits_on_both_sides_of_the_switch(length: int, window: int | None) -> None:
    ours, theirs = phi3_pair(dense_config(window))
    ids = random_ids(2, length)
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits
    assert report(f"T={length} window={window}", got, expected) <= tolerance(expected)


@pytest.mark.parametrize("config", [
    longrope_config(4096, rope_scaling=None, max_position_embeddings=4096, sliding_window=2047),
    longrope_config(4096, num_key_value_heads=4, tie_word_embeddings=True),
    longrope_config(4096, num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size=32),
], ids=["plain-rope", "tied-multi-head", "one-kv-head"])  # fmt: skip
def test_logits_of_other_shapes(config: ModelConfig) -> None:
    ours, theirs = phi3_pair(config)
    ids = random_ids(3, 50)
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits
    assert report("other shape", got, expected) <= tolerance(expected)


def test_a_fault_exceeds_the_tolerance_a_thousandfold() -> None:
    """The measure can fail: short factors in place of the long ones are seen at once."""
    ours, theirs = phi3_pair(dense_config(None, original=32))
    ids = random_ids(2, 40)
    ours.model.rope.original_length = 10_000
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits
    assert report("injected fault", got, expected) > 1000 * tolerance(expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_row_alone_in_transformers(side: str, window: int | None) -> None:
    """Rows of 20, 33 and 41 tokens with the switch at 32: transformers alone chooses rightly for each."""
    ours, theirs = phi3_pair(dense_config(window, original=32))
    lengths = [20, 33, 41]
    ids, mask = torch.full((3, 41), 150), torch.zeros(3, 41, dtype=torch.int64)
    rows = [random_ids(1, length, seed=length)[0] for length in lengths]
    for row, tokens in enumerate(rows):
        where = slice(41 - len(tokens), 41) if side == "left" else slice(0, len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    with torch.no_grad():
        got = ours(ids, attention_mask=mask).logits
        for row, tokens in enumerate(rows):
            expected = theirs(tokens[None]).logits[0]
            assert report(f"{side} row {row}", got[row][mask[row].bool()], expected) <= tolerance(expected)


@pytest.mark.parametrize("original", [4096, 32])
def test_loss_and_gradients(original: int) -> None:
    ours, theirs = phi3_pair(dense_config(None, original))
    ids = random_ids(2, 40)
    labels = ids.clone()
    labels[0, :11] = -100
    labels[1, 30:] = -100
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for training in (False, True):
        ours.train(training).zero_grad()
        output = ours(ids, labels=labels)
        assert (output.logits is None) == training
        output.loss.backward()
        # Measured: 1e-7 relative at most.
        assert abs(float(output.loss.detach() - expected.detach())) <= 1e-6 * float(expected.detach())
        for name, parameter in ours.named_parameters():
            error = (parameter.grad - reference[name]).norm() / reference[name].norm()
            assert error <= 1e-5, f"{name}: relative gradient error {error:.1e}"


@pytest.mark.parametrize("window", WINDOWS)
def test_greedy_continuation_token_for_token(window: int | None) -> None:
    """40 steps that cross the switch at 32: transformers drops its cache there and starts anew."""
    ours, theirs = phi3_pair(dense_config(window, original=32))
    ids = random_ids(1, 12)
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=150)
        got = ids
        for _ in range(40):
            got = torch.cat((got, ours(got).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert got.tolist() == expected.tolist()
