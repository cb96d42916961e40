"""Filters and draws against naive loops, and against transformers' processors."""

import math

import pytest
import torch

from phi35.generation.sampling import SamplingOptions, filtered, next_tokens, penalised, row_generators


def naive(scores: list[float], options: SamplingOptions) -> set[int]:
    """Tokens that stay, by the filters' definitions, one after another."""
    scores = [score / options.temperature for score in scores]
    kept = sorted(range(len(scores)), key=lambda token: -scores[token])

    def probabilities() -> dict[int, float]:
        total = sum(math.exp(scores[token]) for token in kept)
        return {token: math.exp(scores[token]) / total for token in kept}

    if options.top_k is not None:
        kept = kept[: options.top_k]
    if options.top_p is not None:
        chosen, total = [], 0.0
        for token, probability in probabilities().items():
            chosen.append(token)
            total += probability
            if total >= options.top_p:
                break
        kept = chosen
    if options.min_p is not None:
        likely = probabilities()
        kept = [token for token in kept if likely[token] >= options.min_p * max(likely.values())]
    return set(kept)


CASES = [
    SamplingOptions(temperature=0.7),
    SamplingOptions(temperature=1.0, top_k=5),
    SamplingOptions(temperature=1.0, top_k=500),
    SamplingOptions(temperature=1.3, top_p=0.8),
    SamplingOptions(temperature=1.0, top_p=1e-6),
    SamplingOptions(temperature=1.0, min_p=0.1),
    SamplingOptions(temperature=1.0, min_p=1.0),
    SamplingOptions(temperature=0.8, top_k=12, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("options", CASES)
def test_filters_keep_what_their_definitions_keep(options: SamplingOptions) -> None:
    scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) * 2
    result = filtered(scores, options)
    for row, kept in zip(scores, result, strict=True):
        assert set(kept.isfinite().nonzero().flatten().tolist()) == naive(row.tolist(), options)
    finite = result.isfinite()
    assert torch.equal(result[finite], (scores / options.temperature)[finite])


@pytest.mark.parametrize("options", CASES)
def test_filters_are_those_of_transformers(options: SamplingOptions) -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is missing")
    scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)) * 2
    ids = torch.randint(60, (4, 9), generator=torch.Generator().manual_seed(2))
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(ids, scores)
    ours = torch.stack([penalised(row, seen.tolist(), 1.3) for row, seen in zip(scores, ids, strict=True)])
    assert torch.equal(ours, theirs)
    theirs = logits_process.TemperatureLogitsWarper(options.temperature)(ids, theirs)
    for name, warper in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
        if (value := getattr(options, name)) is not None:
            theirs = getattr(logits_process, f"{warper}LogitsWarper")(value)(ids, theirs)
    assert torch.equal(filtered(ours, options), theirs)


def test_the_penalty_passes_over_images_and_counts_a_token_once() -> None:
    scores = torch.tensor([2.0, -2.0, 1.0])
    assert penalised(scores, [-1, -1, 0, 0, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert penalised(scores, [-1], 2.0).tolist() == scores.tolist()


def test_draws_follow_the_probabilities() -> None:
    """4,000 draws: the standard deviation of a frequency is 0.008; the largest deviation measured here is 0.018."""
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    (generator,) = row_generators(3, 1)
    logits = probabilities.log().expand(1, -1)
    counts = torch.zeros(5)
    for _ in range(4_000):
        counts[next_tokens(logits, SamplingOptions(temperature=1.0), [[]], [generator])[0]] += 1
    assert (counts / 4_000 - probabilities).abs().max() < 0.03
    assert counts[0] == counts[4] == 0


def test_greedy_takes_the_first_best_and_draws_nothing() -> None:
    (generator,) = row_generators(3, 1)
    before = generator.get_state()
    assert next_tokens(torch.tensor([[1.0, 3.0, 3.0]]), SamplingOptions(), [[]], [generator]) == [1]
    assert torch.equal(generator.get_state(), before)
    penalty = SamplingOptions(repetition_penalty=2.0)
    assert next_tokens(torch.tensor([[1.0, 3.0, 2.0]]), penalty, [[1]], [generator]) == [2]


def test_seeds() -> None:
    assert [g.initial_seed() for g in row_generators(5, 3)] == [5, 5, 5]
    assert [g.initial_seed() for g in row_generators([1, 2], 2)] == [1, 2]
    assert len({g.initial_seed() for g in row_generators(None, 4)}) == 4


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    scores = torch.randn(4, 60, generator=torch.Generator().manual_seed(3)) * 20
    chosen = next_tokens(scores, SamplingOptions(temperature=temperature), [[]] * 4, row_generators(0, 4))
    assert chosen == scores.argmax(dim=-1).tolist()
