"""Expert parallelism (ZeRO 0 to 2), dropless: each process keeps some of every sparse layer's experts.

Every process of an expert group keeps E / ep experts of each sparse layer: a slice of dimension 0 of the expert
tensors. Each token's hidden state travels to the processes that hold its experts and its result travels back, by the
true counts; router, weights and the sum over a token's experts stay at home. Routing keeps global expert numbers.

``moe.expert_exchange`` is the exchange, which knows process groups alone; ``moe.deepspeed_adapter`` is all that knows
DeepSpeed. An expert's gradient is the sum over the group's tokens; DeepSpeed divides it by the whole data-parallel
size, as it does for all others, so nothing is scaled here.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from moe import deepspeed_adapter
from moe.exchange_plan import CountExchange
from moe.expert_exchange import ExchangeClock, exchanged_experts
from moe.experts import Experts, check_limit, combine, sort_by_expert
from moe.layer import SparseMoE
from moe.row_products import RowProducts, TorchRows
from phi35.outputs import RouterOutput

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

NUM_CHUNKS = {"cpu": 1, "cuda": 1}
"""Pieces into which an exchange is cut by default, by device. Measured on two H100 with NVLink: with more pieces less
of the exchange is waited for, but the products take as much longer (docs/moe.md); slower links may want two."""


def validate(ep_size: int, world_size: int, num_experts: int, zero_stage: int = 0) -> None:
    """Check that experts can be spread so, before anything is allocated.

    Args:
        ep_size: processes that share one set of experts; 1 for no expert parallelism.
        world_size: all processes.
        num_experts: E of each sparse layer, 0 for a dense model.
        zero_stage: ZeRO stage, 0 to 3.

    Raises:
        ValueError: with all that is wrong.
    """
    if ep_size < 1:
        raise ValueError(f"ep_size must be at least 1, got {ep_size}")
    if ep_size == 1:
        return
    problems = []
    if num_experts == 0:
        problems.append("the model is dense; use ep_size 1")
    elif num_experts % ep_size:
        problems.append(f"ep_size {ep_size} must divide the {num_experts} experts")
    if world_size % ep_size:
        problems.append(f"ep_size {ep_size} must divide the {world_size} processes")
    if zero_stage >= 3:
        problems.append("ZeRO-3 partitions parameters itself and excludes expert parallelism; use ZeRO 0, 1 or 2")
    if problems:
        raise ValueError("expert parallelism is not possible: " + "; ".join(problems))


def shard(model: nn.Module, ep_size: int, num_chunks: int | None = None) -> nn.Module:
    """Turn every ``SparseMoE`` of a model into its expert-parallel form, in place.

    Call it on every process, with equal weights, after ``deepspeed.init_distributed`` and before
    ``deepspeed.initialize``. The full expert tensors must be at hand (or on the meta device); each is replaced by
    this process's slice, a new parameter with ``expert_shard = (first expert, E)``, ``allreduce = False`` and
    ``group_name``, which DeepSpeed and the checkpoints read. Freeze experts before: DeepSpeed is shown layers whose
    experts are trained alone.

    Args:
        model: holds the layers; may be one.
        ep_size: processes per set of experts; 1 leaves the model as it is.
        num_chunks: pieces in which tokens travel, under each other's products (at most one per local expert); None
            takes the device's ``NUM_CHUNKS``.

    Returns:
        The same model.

    Raises:
        ValueError: if ``validate`` refuses, a layer is sharded already, or no process group stands.
    """
    if num_chunks is not None and num_chunks < 1:
        raise ValueError(f"num_chunks must be at least 1, or None for the device's default, got {num_chunks}")
    layers = [module for module in model.modules() if isinstance(module, SparseMoE)]
    if any(isinstance(layer, _ExpertExchange) for layer in layers):
        raise ValueError("the model is sharded over experts already; shard a model with whole expert tensors")
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    validate(ep_size, world_size, layers[0].num_experts if layers else 0)
    if ep_size == 1:
        return model
    group_name = deepspeed_adapter.create_expert_groups(ep_size)
    for layer in layers:
        _shard_layer(layer, group_name, num_chunks)
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all sharded expert tensors of a model."""
    return {name: parameter for name, parameter in model.named_parameters() if hasattr(parameter, "expert_shard")}


class _ExpertExchange:
    """What a sharded layer does otherwise: its experts are reached through a process group.

    Attributes:
        num_chunks: pieces of an exchange; None for the device's ``NUM_CHUNKS``.
        clock: takes the times of the layer's exchanges where set.
    """

    num_experts: int
    ep_size: int
    num_local_experts: int
    expert_group_name: str
    num_chunks: int | None
    clock: ExchangeClock | None
    experts: nn.Module

    def run_experts(self, tokens: torch.Tensor, router_output: RouterOutput) -> torch.Tensor:
        """(N, D) weighted sum of each token's experts, wherever those are.

        All processes of the group must call this alike, also with N = 0; the counts are read on the host.
        """
        group = deepspeed_adapter.expert_group(self.expert_group_name)
        num_chunks = self.num_chunks or NUM_CHUNKS.get(tokens.device.type, 1)
        experts = self.experts
        # A container with another forward, such as a quantized one, runs its own experts.
        plain = isinstance(experts, Experts) and type(experts).forward is Experts.forward
        products = _row_products(experts, tokens, num_chunks) if plain else None  # type: ignore[arg-type]
        if products is None:
            return self._run_any_container(tokens, router_output, group)
        assert isinstance(experts, Experts)
        return exchanged_experts(
            tokens,
            router_output.expert_indices,
            router_output.expert_weights,
            experts.gate_up_proj,
            experts.down_proj,
            experts.hidden_act,
            group=group,
            products=products,
            num_chunks=num_chunks,
            clock=self.clock,
        )

    def _run_any_container(
        self, tokens: torch.Tensor, router_output: RouterOutput, group: "distributed.ProcessGroup"
    ) -> torch.Tensor:
        """The same for whatever takes the place of ``Experts``: its own forward between two whole exchanges."""
        rows = sort_by_expert(tokens, router_output.expert_indices, self.num_experts)
        sent, received = CountExchange(rows.ends.diff(prepend=rows.ends.new_zeros(1)), group).wait()
        size = self.num_local_experts
        sent_splits = [sum(sent[first : first + size]) for first in range(0, len(sent), size)]
        received_splits = [sum(counts) for counts in received]
        arrived = _AllToAll.apply(rows.values, received_splits, sent_splits, group)
        local = [expert for counts in received for expert, count in enumerate(counts) for _ in range(count)]
        local_indices = torch.tensor(local, dtype=torch.int64).to(tokens.device, non_blocking=True)
        # The weights stay with the token, so that its sum over experts is the one of a single process.
        ones = torch.ones(arrived.shape[0], 1, device=tokens.device)
        answers = self.experts(arrived, local_indices.unsqueeze(1), ones)
        returned = _AllToAll.apply(answers, sent_splits, received_splits, group)
        return combine(returned, rows.inverse, router_output.expert_weights, tokens.dtype)


class _AllToAll(torch.autograd.Function):
    """Rows to and from every process of a group; gradients travel back the same way."""

    @staticmethod
    def forward(
        ctx: "FunctionCtx",
        rows: torch.Tensor,
        received_splits: list[int],
        sent_splits: list[int],
        group: "distributed.ProcessGroup",
    ) -> torch.Tensor:
        ctx.exchange = (received_splits, sent_splits, group)  # type: ignore[attr-defined]
        return _exchange(rows, received_splits, sent_splits, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        received_splits, sent_splits, group = ctx.exchange
        return _exchange(grad_outputs[0], sent_splits, received_splits, group), None, None, None


def _exchange(
    rows: torch.Tensor, received_splits: list[int], sent_splits: list[int], group: "distributed.ProcessGroup"
) -> torch.Tensor:
    received = rows.new_empty(sum(received_splits), *rows.shape[1:])
    distributed.all_to_all_single(received, rows.contiguous(), received_splits, sent_splits, group=group)
    return received


def _row_products(experts: Experts, tokens: torch.Tensor, num_chunks: int) -> RowProducts | None:
    """What multiplies these rows in chunks; None for a backend that takes whole layers only.

    Raises:
        ValueError: if a backend was asked for by name and cannot run on this dtype or these sizes.
    """
    name = experts.backend_for(tokens)
    check_limit(name, tokens, experts.gate_up_proj, experts.down_proj)
    if name == "triton":
        from moe.kernels.expert_rows import OVERLAPPED_WAVES, TritonRows

        return TritonRows(waves=OVERLAPPED_WAVES if num_chunks > 1 else 1)
    return TorchRows(grouped=name == "grouped_mm") if name in ("grouped_mm", "loop") else None


def _shard_layer(layer: SparseMoE, group_name: str, num_chunks: int | None) -> None:
    group = deepspeed_adapter.expert_group(group_name)
    ep_size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    num_local_experts = layer.num_experts // ep_size
    first = rank * num_local_experts
    for name, full in list(layer.experts.named_parameters(recurse=False)):
        # A copy, so that the full tensor can be freed.
        local = full.detach()[first : first + num_local_experts].clone()
        parameter = nn.Parameter(local, requires_grad=full.requires_grad)
        parameter.expert_shard = (first, layer.num_experts)  # type: ignore[attr-defined]
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name  # type: ignore[attr-defined]
        setattr(layer.experts, name, parameter)
    # Codes and scales of a quantized container.
    for name, whole in list(layer.experts.named_buffers(recurse=False)):
        assert whole.shape[0] == layer.num_experts, f"{name} is not one of a value per expert"
        part = whole[first : first + num_local_experts].clone()
        part.expert_shard = (first, layer.num_experts)  # type: ignore[attr-defined]
        setattr(layer.experts, name, part)
    sharded: Any = layer
    if "num_experts" in vars(layer.experts):
        sharded.experts.num_experts = num_local_experts
    trained = any(parameter.requires_grad for parameter in layer.experts.parameters())
    make_class = deepspeed_adapter.recognised_class if trained else deepspeed_adapter.plain_class
    sharded.__class__ = make_class(_ExpertExchange, sharded.__class__)
    sharded.ep_size = ep_size
    sharded.num_local_experts = num_local_experts
    sharded.expert_group_name = group_name
    sharded.num_chunks = num_chunks
    sharded.clock = None
