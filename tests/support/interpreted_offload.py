"""Runs experts in host memory by the Triton kernels in Triton's interpreter and prints what differs as JSON.

A process of its own: TRITON_INTERPRET must stand before Triton is imported, and stays.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

import phi35
from phi35.presets import get

NUM_EXPERTS = 6
CASES = {"rounds": (66, 2, 3), "four_choices": (65, 4, 5), "few_tokens": (9, 2, 3), "one_token": (1, 2, 2)}
"""Tokens, choices of each, places."""


@torch.no_grad()
def differing(tokens: int, top_k: int, places: int) -> int:
    """Numbers in which experts with so few places differ from all in place."""
    config = get("tiny-phi-3.5-moe").replace(num_local_experts=NUM_EXPERTS, num_hidden_layers=1, router_type="topk")
    config = config.replace(num_experts_per_tok=top_k, experts_backend="triton", initializer_range=0.2)
    expected = phi35.create(config, seed=0).model.layers[0].mlp.experts
    budget = places * sum(tensor[0].nbytes for tensor in expected.parameters())
    experts = phi35.create(config, seed=0, expert_memory=budget).model.layers[0].mlp.experts
    assert experts.num_places == places
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(tokens, config.hidden_size, generator=generator)
    chosen = torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(top_k, dim=1).indices
    weights = torch.rand(tokens, top_k, generator=generator)
    wrong = experts(hidden_states, chosen, weights) != expected(hidden_states, chosen, weights)
    return int(wrong.sum())


print(json.dumps({name: differing(*case) for name, case in CASES.items()}))
