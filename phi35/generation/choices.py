"""The batcher's choices on the host, and the most likely tokens beside each choice."""

import torch

from phi35.generation.constraints import as_bools
from phi35.generation.requests import Alternatives, Request
from phi35.generation.sampling import next_tokens

MAX_ALTERNATIVES = 20
"""Most likely tokens that can be asked for."""


def choose_on_host(requests: list[Request], logits: torch.Tensor) -> list[tuple[int, float]]:
    """The next token of each request, and its log-probability under the model itself.

    Args:
        requests: n requests; of constrained ones ``mask`` holds what may come.
        logits: (n, V).
    """
    scores = logits.float()
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    for place, request in enumerate(requests):
        row, options = scores[place : place + 1], request.options
        if request.mask is not None:
            row = row.masked_fill(~as_bools(request.mask, row.shape[1]).to(row.device), float("-inf"))
        elif options.temperature == 0 and options.repetition_penalty == 1:
            continue
        (tokens[place],) = next_tokens(row, options, [request.row.seen], [request.row.generator])
    chosen = torch.tensor(tokens, device=scores.device)[:, None]
    logprobs: list[float] = scores.log_softmax(dim=-1).gather(1, chosen).flatten().tolist()
    return list(zip(tokens, logprobs, strict=True))


def alternatives(requests: list[Request], logits: torch.Tensor) -> Alternatives | None:
    """The most likely tokens, if a request asks for them; queued on the device, not waited for.

    Args:
        requests: n requests.
        logits: (n, V) from which they choose.
    """
    most = max(request.num_alternatives for request in requests)
    if most == 0:
        return None
    logprobs, ids = logits.float().log_softmax(dim=-1).topk(min(most, logits.shape[1]), dim=-1)
    return Alternatives(_to_host(ids), _to_host(logprobs))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=pinned)
