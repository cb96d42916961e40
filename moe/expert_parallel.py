"""Expert parallelism over DeepSpeed's process groups (ZeRO 0 to 2), dropless.

Every process of an expert group keeps E / ep experts of each sparse layer: a slice of dimension 0 of the expert
tensors. Each token's hidden state travels to the processes that hold its experts and its result travels back, by
all-to-all with the true counts; router, weights and the sum over a token's experts stay at home. Routing keeps
global expert numbers.

DeepSpeed recognises sparse layers by its own class, so a sharded layer's class becomes one made of this module's
exchange, the layer's own class and ``deepspeed.moe.layer.MoE``; parameter names do not change. An expert's gradient
is the sum over the group's tokens; DeepSpeed divides it by the whole data-parallel size, as it does for all others,
so nothing is scaled here.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from moe.experts import combine, sort_by_expert
from moe.layer import SparseMoE
from phi35.outputs import RouterOutput

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx


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


def shard(model: nn.Module, ep_size: int) -> nn.Module:
    """Turn every ``SparseMoE`` of a model into its expert-parallel form, in place.

    Call it on every process, with equal weights, after ``deepspeed.init_distributed`` and before
    ``deepspeed.initialize``. The full expert tensors must be at hand (or on the meta device); each is replaced by
    this process's slice, a new parameter with ``expert_shard = (first expert, E)``, ``allreduce = False`` and
    ``group_name``, which DeepSpeed and the checkpoints read.

    Args:
        model: holds the layers; may be one.
        ep_size: processes per set of experts; 1 leaves the model as it is.

    Returns:
        The same model.

    Raises:
        ValueError: if ``validate`` refuses, a layer is sharded already, or no process group stands.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseMoE)]
    if any(isinstance(layer, _ExpertExchange) for layer in layers):
        raise ValueError("the model is sharded over experts already; shard a model with whole expert tensors")
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    validate(ep_size, world_size, layers[0].num_experts if layers else 0)
    if ep_size == 1:
        return model
    group, group_name = _expert_group(ep_size)
    for layer in layers:
        _shard_layer(layer, group, group_name)
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all sharded expert tensors of a model."""
    return {name: parameter for name, parameter in model.named_parameters() if hasattr(parameter, "expert_shard")}


class _ExpertExchange:
    """What a sharded layer does otherwise: its experts are reached by all-to-all."""

    num_experts: int
    ep_size: int
    num_local_experts: int
    expert_group_name: str
    experts: nn.Module

    @property
    def expert_group(self) -> "distributed.ProcessGroup":
        """This process's group; looked up, since a module that held it could not be copied."""
        from deepspeed.utils import groups

        return groups._get_expert_parallel_group(self.expert_group_name)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed asks every layer to make its groups; ``shard`` has made them."""

    def run_experts(self, tokens: torch.Tensor, router_output: RouterOutput) -> torch.Tensor:
        """(N, D) weighted sum of each token's experts, wherever those are.

        All processes of the group must call this alike, also with N = 0; the counts are read on the host.
        """
        group = self.expert_group
        rows = sort_by_expert(tokens, router_output.expert_indices, self.num_experts)
        sent = rows.ends.diff(prepend=rows.ends.new_zeros(1))  # (E,) rows for each expert
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=group)
        received = received.view(self.ep_size, self.num_local_experts)  # rows from each process for each own expert
        sent_splits = sent.view(self.ep_size, -1).sum(dim=1).tolist()
        received_splits = received.sum(dim=1).tolist()
        arrived = _AllToAll.apply(rows.values, received_splits, sent_splits, group)
        local_experts = torch.arange(self.num_local_experts, device=tokens.device).repeat(self.ep_size)
        local_indices = local_experts.repeat_interleave(received.reshape(-1), output_size=arrived.shape[0])
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


def _expert_group(ep_size: int) -> tuple["distributed.ProcessGroup", str]:
    """DeepSpeed's expert group of this process, made where it does not stand yet, and its name."""
    from deepspeed import comm
    from deepspeed.utils import groups

    if not comm.is_initialized():
        raise ValueError("expert parallelism needs process groups: call deepspeed.init_distributed() first")
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return groups._get_expert_parallel_group(name), name


def _shard_layer(layer: SparseMoE, group: "distributed.ProcessGroup", group_name: str) -> None:
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
    sharded: Any = layer
    sharded.__class__ = _sharded_class(sharded.__class__)
    sharded.ep_size = ep_size
    sharded.num_local_experts = num_local_experts
    sharded.expert_group_name = group_name


@functools.cache
def _sharded_class(layer_class: type) -> type:
    from deepspeed.moe.layer import MoE

    return type(f"ExpertParallel{layer_class.__name__}", (_ExpertExchange, layer_class, MoE), {})
