"""The balance loss over a process group: averaged gradients are those of the joined batch."""

import torch
from distributed import run_distributed

from moe.losses import load_balancing_loss
from phi35.outputs import RouterOutput


def routing(rank):
    generator = torch.Generator().manual_seed(rank)
    indices = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(8)])
    return RouterOutput(torch.randn(8, 4, generator=generator).requires_grad_(), indices, torch.ones(8, 2))


def balance_gradient(rank, world_size, masks):
    layers = [routing(2 * rank), routing(2 * rank + 1)]
    loss = load_balancing_loss(layers, torch.tensor(masks[rank]), torch.distributed.group.WORLD)
    loss.backward()
    return loss.detach(), [layer.logits.grad / world_size for layer in layers]


def test_gradients_averaged_over_the_group_are_those_of_the_joined_batch():
    masks = [[[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 1, 1], [1, 1, 1, 1]]]  # as many tokens on each rank
    ranks = run_distributed(balance_gradient, 2, masks)
    joined = []
    for layer in range(2):
        parts = [routing(2 * rank + layer) for rank in range(2)]
        joined.append(
            RouterOutput(
                torch.cat([part.logits.detach() for part in parts]).requires_grad_(),
                torch.cat([part.expert_indices for part in parts]),
                torch.cat([part.expert_weights for part in parts]),
            )
        )
    loss = load_balancing_loss(joined, torch.tensor(masks).reshape(4, 4))
    loss.backward()
    mean = torch.stack([value for value, _ in ranks]).mean()
    torch.testing.assert_close(mean, loss.detach(), rtol=0, atol=1e-6)  # measured 1.2e-7
    for layer in range(2):
        averaged = torch.cat([gradients[layer] for _, gradients in ranks])
        torch.testing.assert_close(averaged, joined[layer].logits.grad, rtol=0, atol=1e-7)  # measured 0
    alone = load_balancing_loss([routing(0), routing(1)], torch.tensor(masks[0]))
    assert abs(alone.item() - ranks[0][0].item()) > 1e-3, "the group's shares must differ from one rank's"
