"""Experts in host memory, some of which have a place on the device: a cache, copies ahead of use, exact results.

After arXiv 2312.17238: each layer keeps its experts used last in a pool on the device, and while it runs, the experts
that the next layer's router would choose for the same tokens are copied beside it. Weights, plain or in few bits, lie
in host memory under their usual names; the pool is a container of the same kind with fewer experts, so that the same
backends run on it with the numbers of places in place of those of experts. Where more experts are wanted than have a
place, as by a prompt, they run in rounds: copies for one while the one before computes.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe.copy_stream import CopyStream, pin

FEW_TOKENS = 64
"""Up to so many rows the kernels of plain and of quantized experts are others than beyond."""
SPECULATED_TOKENS = 4
"""Most tokens of a pass for which the next layer's experts are guessed."""


@dataclass
class ExpertStatistics:
    """What the pools have done.

    Attributes:
        used: experts that passes needed.
        copied: of those, how many were copied then, for want of a place before.
        guessed: experts that were copied ahead.
        num_bytes: copied in all.
    """

    used: int = 0
    copied: int = 0
    guessed: int = 0
    num_bytes: int = 0


class OffloadedExperts(nn.Module):
    """Takes the place of ``moe.experts.Experts``, or of a quantized container, by the same ``forward``.

    For inference; made on the meta device, best before the model has memory (see ``offload_experts``).

    Args:
        experts: the container whose weights it takes over.
        num_places: experts that fit on the device.
        copies: the model's copy stream.
        statistics: the model's counts.

    Attributes:
        guess_ahead: whether to copy what the next layer may want.
        waits_for_host: the choice of experts is read on the host, so that no CUDA graph can hold this module.
    """

    waits_for_host = True
    _last_use: Any

    def __init__(self, experts: nn.Module, num_places: int, copies: CopyStream, statistics: ExpertStatistics) -> None:
        super().__init__()
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.num_experts = int(next(iter(self._weights().values())).shape[0])
        self.num_places = min(num_places, self.num_experts)
        self.statistics, self.guess_ahead = statistics, True
        self._copies = copies
        # In a tuple, and so no submodule: what the device holds is no state of the model.
        self._pool = (_container(experts, self._weights(), self.num_places),)
        self._pins: dict[str, weakref.finalize[..., Any]] = {}
        self._following: tuple[nn.Module, OffloadedExperts] | tuple[()] = ()
        self._forget()

    def follow(self, router: nn.Module, experts: "OffloadedExperts") -> None:
        """Copy ahead what this router, the next sparse layer's, will choose of these experts."""
        self._following = (router, experts)

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts: (N, D) from (N, D), (N, k) and (N, k), as ``Experts.forward``.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("experts in host memory are for inference: call model.eval(), or load without offload")
        chosen, guess = self._on_host(hidden_states, expert_indices)
        wanted = chosen.unique().tolist()
        self.statistics.used += len(wanted)
        if not wanted:
            return torch.zeros_like(hidden_states)
        if len(wanted) <= self.num_places:
            self._copy_in(wanted)
            self._guess(guess)
            result = self._run(wanted, hidden_states, self._places(chosen, hidden_states.device), expert_weights)
        else:
            few = len(hidden_states) <= FEW_TOKENS and self._has_kernels_for_few(hidden_states)
            run = self._run_token_by_token if few else self._run_in_rounds
            result = run(wanted, hidden_states, chosen, expert_weights)
            self._guess(guess)
        return result

    def _on_host(self, hidden_states: torch.Tensor, expert_indices: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """The choice (N, k) on the host, and the experts that the next layer may want, by one transfer."""
        few = 0 < len(hidden_states) <= SPECULATED_TOKENS
        if not (self._following and self.guess_ahead and few):
            return expert_indices.cpu(), []
        guessed = self._following[0](hidden_states).expert_indices
        both = torch.stack((expert_indices, guessed)).cpu() if guessed.shape == expert_indices.shape else None
        if both is None:
            return expert_indices.cpu(), guessed.unique().tolist()
        return both[0], both[1].unique().tolist()

    def _run(
        self, experts: Iterable[int], hidden_states: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the pool on choices given by place, once these experts' copies have arrived."""
        self._copies.wait_for(self._arrived[self._place_of[expert]] for expert in experts)
        result = self._pool[0](hidden_states, places, weights)
        self._last_use = self._copies.mark()
        return result

    def _places(self, chosen: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Numbers of places on the device, of experts (N, k) that all have one."""
        return torch.tensor(self._place_of)[chosen].to(device)

    def _run_token_by_token(
        self, wanted: Sequence[int], hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum for few tokens, in groups of those whose experts fit together.

        The kernels for few rows add a token's choices before they round, so that these must not be torn apart; they
        compute each token alone.
        """
        groups: list[tuple[set[int], list[int]]] = [(set(), [])]
        # In the order of their first experts: neighbours share some.
        for token, experts in sorted(enumerate(chosen.tolist()), key=lambda one: sorted(one[1])):
            if len(groups[-1][0] | set(experts)) > self.num_places:
                groups.append((set(), []))
            groups[-1][0].update(experts)
            groups[-1][1].append(token)
        result = torch.empty_like(hidden_states)
        for needed, tokens in groups:
            self._copy_in(sorted(needed))
            rows = torch.tensor(tokens)
            places, rows_there = self._places(chosen[rows], result.device), rows.to(result.device)
            result[rows_there] = self._run(needed, hidden_states[rows_there], places, weights[rows_there])
        return result

    def _run_in_rounds(
        self, wanted: Sequence[int], hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The same sum where not all wanted experts have a place at once.

        Each choice's row is kept in the tokens' dtype, and all are weighted and added at the end by what the container
        in place adds with: a multiplication fused with the sum, as in a kernel's, rounds otherwise than one apart, and
        2 of 100,000 numbers in bfloat16 show it.
        """
        num_tokens, top_k = chosen.shape
        ordered, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(self.num_experts), right=True).tolist()
        device = hidden_states.device
        rows = hidden_states.new_empty((num_tokens * top_k, hidden_states.shape[1]))
        rounds = self._rounds(wanted)
        self._copy_in(rounds[0])
        for number, experts in enumerate(rounds):
            following = rounds[number + 1] if number + 1 < len(rounds) else []
            early = len(experts) + len(following) <= self.num_places
            if early and following:
                self._copy_in(following, keep=experts)
            parts = [order[(ends[expert - 1] if expert else 0) : ends[expert]] for expert in experts]
            places = torch.cat(
                [torch.full((len(part), 1), self._place_of[one]) for part, one in zip(parts, experts, strict=True)]
            )
            pairs = torch.cat(parts)
            if len(pairs) <= FEW_TOKENS < num_tokens and self._has_kernels_for_few(hidden_states):
                # The same row several times: in place all rows go through the kernels for many, which round otherwise.
                more = FEW_TOKENS + 1 - len(pairs)
                pairs, places = (torch.cat((one, one[-1:].expand(more, *one.shape[1:]))) for one in (pairs, places))
            pairs = pairs.to(device)
            ones = weights.new_ones((len(pairs), 1))
            rows[pairs] = self._run(experts, hidden_states[pairs // top_k], places.to(device), ones)
            if not early:
                self._copy_in(following)
        combined: torch.Tensor = self._pool[0].combine_choices(rows.view(num_tokens, top_k, -1), weights)  # type: ignore[operator]
        return combined

    def _has_kernels_for_few(self, hidden_states: torch.Tensor) -> bool:
        return bool(self._pool[0].has_kernels_for_few(hidden_states))  # type: ignore[operator]

    def _rounds(self, wanted: Sequence[int]) -> list[list[int]]:
        """Experts that run together: first those that are there, then the others by half as many as have a place."""
        here = [expert for expert in wanted if self._place_of[expert] >= 0]
        absent = [expert for expert in wanted if self._place_of[expert] < 0]
        size = max(1, self.num_places // 2)
        # Half of the places at a time, so that the next ones have somewhere to go meanwhile.
        groups = [part[start : start + size] for part in (here, absent) for start in range(0, len(part), size)]
        return groups

    def _guess(self, experts: Sequence[int]) -> None:
        if self._following and experts:
            self._following[1].copy_ahead(experts)

    def copy_ahead(self, experts: Sequence[int]) -> None:
        """Begin to copy experts that may be wanted soon, the first of them where not all have a place."""
        before = self.statistics.copied
        self._copy_in(list(experts)[: self.num_places])
        self.statistics.guessed += self.statistics.copied - before
        self.statistics.copied = before

    def _copy_in(self, experts: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Give experts a place, that of the one used longest ago; those of ``keep`` stay."""
        self._clock += 1
        for expert in experts:
            if self._place_of[expert] >= 0:
                self._used[self._place_of[expert]] = self._clock
        kept = {*experts, *keep}
        absent = [expert for expert in experts if self._place_of[expert] < 0]
        free = sorted(
            (place for place, expert in enumerate(self._expert_in) if expert not in kept),
            key=lambda place: self._used[place],
        )
        assert len(free) >= len(absent), "more experts than places"
        if not absent:
            return
        weights, pool = self._weights(), _tensors(self._pool[0])
        with torch.no_grad(), self._copies.copying(self._last_use):
            for expert, place in zip(absent, free, strict=False):
                if (old := self._expert_in[place]) >= 0:
                    self._place_of[old] = -1
                self._expert_in[place], self._place_of[expert] = expert, place
                self._used[place] = self._clock
                for name, tensor in weights.items():
                    pool[name][place].copy_(tensor[expert], non_blocking=True)
                self._arrived[place] = self._copies.mark()
        self.statistics.copied += len(absent)
        self.statistics.num_bytes += len(absent) * sum(tensor[0].nbytes for tensor in weights.values())

    def _weights(self) -> dict[str, torch.Tensor]:
        return _tensors(self)

    def _forget(self) -> None:
        """Empty the pool."""
        self._place_of, self._expert_in = [-1] * self.num_experts, [-1] * self.num_places
        self._used, self._clock = [0] * self.num_places, 0
        self._arrived: list[Any] = [None] * self.num_places
        self._last_use = None

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._forget()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "OffloadedExperts":
        """Weights take the dtype that is asked for and stay in host memory; the pool goes to the device."""
        for name, tensor in self._weights().items():
            asked = fn(torch.empty(0, dtype=tensor.dtype, device=_tensors(self._pool[0])[name].device))
            self._copies.device = asked.device
            dtype = asked.dtype if name in self._parameters else tensor.dtype  # codes and scales keep theirs
            self._place_host(name, tensor, dtype, asked.device)
            pool = self._pool[0]
            old = _tensors(pool)[name]
            if (old.dtype, old.device) != (dtype, asked.device):
                _set(pool, name, torch.empty(old.shape, dtype=dtype, device=asked.device))
                self._forget()
        return self

    def _place_host(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
        host = torch.device("meta" if device.type == "meta" else "cpu")
        if (tensor.dtype, tensor.device) != (dtype, host):
            if tensor.is_meta or host.type == "meta":
                tensor = torch.empty(tensor.shape, dtype=dtype, device=host)
                if device.type == "cuda":
                    tensor.view(torch.uint8).zero_()  # all threads bring its pages in; locking them would one by one
            else:
                tensor = tensor.to(host, dtype)
            if (pinned := self._pins.pop(name, None)) is not None:
                pinned()
            _set(self, name, tensor)
        if device.type == "cuda" and name not in self._pins:
            self._pins[name] = weakref.finalize(self, pin(tensor))
            self._pins[name].atexit = False  # the system unlocks what a process leaves

    def extra_repr(self) -> str:
        """Counts, for the printed model."""
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self._weights().items())
        return f"{self.num_places} of {self.num_experts} experts on the device, {shapes}"


class OffloadedQuantizedExperts(OffloadedExperts):
    """The same for a container in few bits."""

    def draw_codes(self, std: float, generator: torch.Generator | None = None) -> None:
        """Random codes, drawn expert by expert in a place of the pool (see ``FewBitModule.draw_codes``)."""
        pool = self._pool[0]
        one = _container(pool, _tensors(pool), 1)
        for name, tensor in _tensors(pool).items():
            _set(one, name, tensor[:1])
        for expert in range(self.num_experts):
            one.draw_codes(std, generator)  # type: ignore[operator]
            for name, tensor in self._weights().items():
                tensor[expert].copy_(_tensors(one)[name][0])
        self._forget()


def offload_experts(model: Any, expert_bytes: int) -> ExpertStatistics:
    """Put the experts of all sparse layers into host memory, with pools of so many bytes in all on the device.

    Args:
        model: a ``phi35.model.CausalLM`` on the meta device, its dtype set.
        expert_bytes: device memory for experts, spread evenly over the layers.

    Returns:
        Counts that the model's passes go on.

    Raises:
        ValueError: if the model has no experts, or a layer would have fewer places than a token has choices.
    """
    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    if not layers:
        raise ValueError("expert_memory is for models with experts, and this one is dense: leave it out")
    one_expert = sum(tensor[0].nbytes for tensor in _tensors(layers[0].experts).values())
    places, more = divmod(expert_bytes // one_expert, len(layers))
    needed = model.config.num_experts_per_tok
    if places < needed:
        raise ValueError(
            f"expert_memory of {expert_bytes / 1e9:.2f} GB has room for {expert_bytes // one_expert} experts, and each "
            f"of {len(layers)} layers needs {needed} at a time: give at least "
            f"{needed * len(layers) * one_expert / 1e9:.2f} GB"
        )
    statistics, copies = ExpertStatistics(), CopyStream()
    before: OffloadedExperts | None = None
    for number, mlp in enumerate(layers):
        make = OffloadedQuantizedExperts if hasattr(mlp.experts, "draw_codes") else OffloadedExperts
        mlp.experts = make(mlp.experts, places + (number < more), copies, statistics).train(mlp.training)
        if before is not None:
            before.follow(mlp.router, mlp.experts)
        before = mlp.experts
    return statistics


def _container(like: nn.Module, weights: dict[str, torch.Tensor], num_experts: int) -> nn.Module:
    """A container of the same kind, of other tensors: room for so many experts, unset."""
    container = copy.copy(like)
    container._parameters, container._buffers = {}, {}
    for name, tensor in weights.items():
        empty = tensor.new_empty((num_experts, *tensor.shape[1:]))
        if name in like._parameters:
            container._parameters[name] = nn.Parameter(empty, requires_grad=False)
        else:
            container._buffers[name] = empty
    if "num_experts" in vars(like):
        container.num_experts = num_experts  # type: ignore[assignment]
    return container.eval()


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of one module, detached from nothing and copied nowhere."""
    found = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor.data if isinstance(tensor, nn.Parameter) else tensor for name, tensor in found}


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
