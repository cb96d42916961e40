"""The decoding loop on a CUDA device."""

import pytest
import torch

import phi35
from phi35.generation.decoding import generate


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny-phi-3.5-mini", "tiny-phi-3.5-moe"])
def test_a_cuda_batch_gives_the_cpus_greedy_and_sampled_tokens(name: str) -> None:
    """float32, rows of 5, 20 and 40 tokens around an original length of 32, two of them crossing or beyond it."""
    model = phi35.create(name, seed=0, initializer_range=0.15, original_max_position_embeddings=32)
    ids = torch.randint(3, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= torch.tensor([[35], [20], [0]])
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}):
        expected = generate(model.cpu(), ids, mask, max_new_tokens=16, **options)
        found = generate(model.cuda(), ids.cuda(), mask.cuda(), max_new_tokens=16, **options)
        assert torch.equal(found.cpu(), expected)
