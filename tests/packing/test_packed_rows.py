"""Samples packed into one row give what each gives in a row of its own, on both sides of the LongRoPE crossing."""

import pytest
import torch
from tiny_configs import longrope_config

from phi35 import presets
from phi35.loading import create
from phi35.model import CausalLM
from phi35.packed_attention import PackedRows, _one_kernel, attend_packed

ROWS = ((5, 40, 1, 32), (33, 2, 17))
"""Lengths of two rows' samples: the original length is 32, so that 40 and 33 take the long factors."""
LENGTH = 80


def built(**changes):
    model = CausalLM(longrope_config(32, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def packed(rows=ROWS, length=LENGTH, vocab_size=150, seed=1):
    """ids with rubbish in the padding, lengths filled up with zeros, and each sample's place."""
    ids = torch.randint(0, vocab_size, (len(rows), length), generator=torch.Generator().manual_seed(seed))
    lengths = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    places = []
    for number, row in enumerate(rows):
        lengths[number, : len(row)] = torch.tensor(row)
        places += [(number, sum(row[:index]), size) for index, size in enumerate(row)]
    return ids, lengths, places


def difference_to_lone_samples(model, ids, lengths, places):
    with torch.no_grad():
        together = model(ids, sequence_lengths=lengths).logits
        lone = [model(ids[row : row + 1, first : first + size]).logits[0] for row, first, size in places]
    pieces = [together[row, first : first + size] for row, first, size in places]
    assert torch.isfinite(together).all()
    assert max(float(one.std()) for one in lone) > 0.1
    return max(float((a - b).abs().max()) for a, b in zip(pieces, lone, strict=True))


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 7}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"norm_type": "layernorm"}],
)
def test_logits_of_a_packed_sample_are_the_lone_samples(changes):
    model = built(**changes).eval()
    ids, lengths, places = packed()
    # Measured: at most 1.3e-6 for logits up to 4; matrix products of other shapes sum in another order.
    assert difference_to_lone_samples(model, ids, lengths, places) <= 5e-6


def test_factors_and_positions_matter_in_this_comparison():
    model = built().eval()
    ids, lengths, places = packed()
    with torch.no_grad():
        as_one = model(ids).logits
        lone = [model(ids[row : row + 1, first : first + size]).logits[0] for row, first, size in places]
    apart = [
        float((as_one[row, first : first + size] - one).abs().max())
        for (row, first, size), one in zip(places, lone, strict=True)
    ]
    assert apart.pop(4) <= 5e-6  # first of its row and long, as the whole row is
    assert min(apart) > 0.05


def test_the_real_crossing_at_4096():
    model = CausalLM(longrope_config(4096, num_hidden_layers=1)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    ids, lengths, places = packed(((4096, 70, 4097),), 4096 + 70 + 4097)
    assert difference_to_lone_samples(model, ids, lengths, places) <= 5e-6
    other_side = packed(((4097, 70, 4096),), 4096 + 70 + 4097)[1]
    with torch.no_grad():
        swapped = model(ids, sequence_lengths=other_side).logits
        right = model(ids, sequence_lengths=lengths).logits
    assert float((swapped[0, :4096] - right[0, :4096]).abs().max()) > 0.01  # the first sample took other factors


def test_sparse_layers_route_packed_samples_as_lone_ones():
    model = create("tiny-phi-3.5-moe", device="cpu", dtype="float32", seed=0).eval()
    ids, lengths, places = packed(((5, 40), (30,)), 48)
    assert difference_to_lone_samples(model, ids, lengths, places) <= 5e-6


def lone_loss_and_gradients(model, ids, labels, places):
    """Cross-entropy summed over lone samples, each with its own shift, over the number of their labels."""
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for row, first, size in places:
        mine = labels[row : row + 1, first : first + size]
        number = int((mine[:, 1:] >= 0).sum())
        if number:
            total = total + model(ids[row : row + 1, first : first + size], labels=mine).loss * number
            count += number
    (total / count).backward()
    return float(total.detach() / count), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
def test_loss_and_gradients_are_those_of_the_lone_samples(checkpointing):
    model = built().train()
    ids, lengths, places = packed()
    labels = ids.clone()
    labels[0, 10:20] = -100
    for number, row in enumerate(lengths):
        labels[number, int(row.sum()) :] = -100
    loss, gradients = lone_loss_and_gradients(model, ids, labels, places)
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    output = model(ids, labels=labels, sequence_lengths=lengths)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(loss, abs=1e-6)
    for name, parameter in model.named_parameters():
        # Measured: at most 9e-8.
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-6, msg=name)


def test_no_sample_predicts_the_next_ones_first_token():
    model = built().train()
    ids, lengths, places = packed()
    labels = torch.full_like(ids, -100)
    for row, first, _ in places:
        labels[row, first] = ids[row, first]  # counted nowhere: nothing of its own stands before it
    assert float(model(ids, labels=labels, sequence_lengths=lengths).loss.detach()) == 0.0
    assert float(model.eval()(ids, labels=labels, sequence_lengths=lengths).loss.detach()) == 0.0


def test_targets_are_labels_already_in_place():
    model = built().train()
    ids, _, _ = packed()
    targets = torch.cat((ids[:, 1:], torch.full((len(ids), 1), -100)), dim=1)
    assert torch.equal(model(ids, targets=targets).loss, model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="targets alone"):
        model(ids, labels=ids, targets=targets)
    with pytest.raises(ValueError, match="targets must be"):
        model(ids, targets=targets[:, 1:])


def test_whole_rows_take_the_plain_path_to_the_bit():
    model = built().eval()
    ids, _, _ = packed()
    with torch.no_grad():
        whole = torch.full((len(ids), 1), LENGTH)
        assert torch.equal(model(ids, sequence_lengths=whole).logits, model(ids).logits)


def test_dropout_acts_on_packed_samples():
    model = built(attention_dropout=0.5).train()
    ids, lengths, _ = packed()
    torch.manual_seed(0)
    first = model(ids, sequence_lengths=lengths).logits
    assert not torch.equal(first, model(ids, sequence_lengths=lengths).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(ids, sequence_lengths=lengths).logits)


def test_compiled_layers_refuse_what_they_would_compile_anew_for_every_batch():
    model = built().train()
    ids, lengths, _ = packed()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="on a GPU in 16 bit"):
        model(ids, sequence_lengths=lengths)
    whole = torch.full((len(ids), 1), LENGTH)
    assert torch.equal(model(ids, sequence_lengths=whole).logits, built().train()(ids).logits)


@pytest.mark.parametrize("kv_heads, window", [(8, None), (2, None), (8, 50)])
def test_compiled_layers_take_other_packings_without_compiling_anew(kv_heads, window):
    """The GPU's form is traced on tensors without memory: any machine can see the graph, none needs to run it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(attend_packed, backend=keep, fullgraph=True, dynamic=False)
    with FakeTensorMode(), torch.no_grad():
        tensors = [
            torch.empty(2, heads, 256, 96, device="cuda", dtype=torch.bfloat16) for heads in (8, kv_heads, kv_heads)
        ]
        for samples in (((256,), (100, 156)), ((7, 8, 9), (250,)), ((200, 56), (1,) * 5)):
            segments = tuple(size for row in samples for size in (*row, 256 - sum(row)) if size)
            rows = PackedRows(
                length=256,
                samples=samples,
                segments=segments,
                all_offsets=torch.empty(9, device="cuda", dtype=torch.int32),
                longest=max(segments),
                kernel=_one_kernel(),
            )
            attended = compiled(*tensors, rows, window)
            assert attended.shape == (2, 8, 256, 96) and attended.device.type == "cuda"
    assert len(graphs) == 1 and any("_varlen_attn" in target for target in graphs[0])


def test_a_row_may_be_all_padding():
    model = built().eval()
    ids, lengths, _ = packed()
    lengths[1] = 0
    with torch.no_grad():
        assert torch.isfinite(model(ids, sequence_lengths=lengths).logits).all()


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.tensor([[81], [1]]), "row 0"),
        (torch.tensor([[80], [-1]]), "row 1"),
        (torch.tensor([80, 80]), r"\(2, S\)"),
        (torch.tensor([[8.0], [8.0]]), "whole numbers"),
    ],
)
def test_lengths_that_do_not_fit_are_named(bad, message):
    ids, _, _ = packed()
    with pytest.raises(ValueError, match=message):
        built()(ids, sequence_lengths=bad)


def test_arguments_that_packed_rows_decide_themselves_are_refused():
    model = built()
    ids, lengths, _ = packed()
    for extra in ({"position_ids": ids}, {"use_cache": True}, {"rope_lengths": torch.tensor([80, 80])}):
        with pytest.raises(ValueError, match="neither position_ids nor"):
            model(ids, sequence_lengths=lengths, **extra)


def test_presets_run_packed():
    for name in ("tiny-phi-3.5-mini", "tiny-phi-3.5-vision"):
        model = create(name, device="cpu", dtype="float32", seed=0).eval()
        ids, lengths, places = packed(((5, 20),), 30, presets.get(name).vocab_size - 1)
        assert difference_to_lone_samples(model, ids, lengths, places) <= 5e-6
