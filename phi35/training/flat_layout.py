"""Where an engine keeps each parameter's float32 values: which flat tensor, from where to where, on which ranks.

At ZeRO stages 1 to 3 the optimizer sees flat tensors that hold pieces of many parameters; at stage 0 it sees the
parameters themselves (or their masters). Everything that must treat a parameter as a whole, such as Muon, a
quantized state or an average of the weights, goes through this map.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank's optimizer holds.

    Attributes:
        flat: the optimizer's tensor that holds it.
        offset: first element within ``flat``.
        start: first element within the parameter.
        count: elements; 0 where this rank holds none.
        shape: of the whole parameter (of this rank's experts, where they are sharded).
        group: ranks that together hold the parameter; None where each holds it whole.
    """

    flat: torch.Tensor
    offset: int
    start: int
    count: int
    shape: torch.Size
    group: Any = None

    def slice(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor laid out like ``flat``; a view."""
        return values.view(-1)[self.offset : self.offset + self.count]  # a view: others write through it

    def gather(self, part: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The whole of something that every rank of the group has its part of; all of them call it.

        Args:
            part: (count,) this rank's.
            device: where the ranks talk to each other.

        Returns:
            A tensor of the parameter's shape, in the dtype of ``part``: a view where this rank holds all of it.
        """
        if self.group is None:
            return part.view(self.shape)
        whole = torch.zeros(self.shape.numel(), dtype=part.dtype, device=device)
        whole[self.start : self.start + self.count] = part.to(device)
        distributed.all_reduce(whole, group=self.group)
        return whole.view(self.shape)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """(count,) this rank's part of a tensor of the parameter's shape."""
        return whole.reshape(-1)[self.start : self.start + self.count]


def pieces_of(zero: Any, stage: int, base: torch.optim.Optimizer) -> dict[nn.Parameter, Piece]:
    """Every trained parameter's piece, in the optimizer's order (equal on all ranks).

    Args:
        zero: DeepSpeed's optimizer (``Engine.optimizer``).
        stage: ZeRO stage.
        base: the optimizer that DeepSpeed drives.
    """
    if stage == 3:
        return dict(_stage_3(zero))
    if stage:
        return dict(_stage_1_2(zero))
    parameters = [parameter for group in base.param_groups for parameter in group["params"]]
    return {one: Piece(_values_of(base, one), 0, 0, one.numel(), one.shape) for one in parameters}


def refresh_weights(zero: Any, stage: int, base: torch.optim.Optimizer) -> None:
    """Makes the model's weights again from the float32 values, after those were changed; collective."""
    if stage == 3:
        zero._partition_all_parameters()  # lets go of what is gathered, small parameters for good among them
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif stage:
        zero.update_lp_params()
    else:
        with torch.no_grad():
            for group in base.param_groups:
                for parameter in group["params"]:
                    values = _values_of(base, parameter)
                    if values is not parameter:
                        parameter.copy_(values)


def _values_of(base: Any, parameter: nn.Parameter) -> torch.Tensor:
    """What the optimizer updates of a parameter at stage 0: its master, or itself."""
    if hasattr(base, "masters"):
        return base.masters[parameter]
    return base.state[parameter].get("master", parameter) if hasattr(base, "state_dtype") else parameter


def _stage_1_2(zero: Any) -> Any:
    if hasattr(zero, "bf16_groups"):  # what DeepSpeed takes for bfloat16 at stage 1 without offload
        groups, partitions = zero.bf16_groups, zero.fp32_groups_flat_partition
    else:
        groups, partitions = zero.bit16_groups, zero.single_partition_of_fp32_groups
    for index, parameters in enumerate(groups):
        flat, group = partitions[index], zero.real_dp_process_group[index]
        shared = group if distributed.get_world_size(group) > 1 else None
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:
                yield parameter, Piece(flat, 0, 0, 0, parameter.shape, shared)
                continue
            high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield parameter, Piece(flat, high.start, low.start, low.numel, parameter.shape, shared)


def _stage_3(zero: Any) -> Any:
    for index, parameters in enumerate(zero.fp16_groups):
        flat = zero.fp32_partitioned_groups_flat[index]
        for parameter in parameters:
            _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            size, rank = parameter.ds_tensor.ds_numel, zero._get_param_partition_rank(parameter)
            start = min(size * rank, parameter.ds_numel)
            count = min(size, parameter.ds_numel - start)  # the last ranks' pieces end in padding
            group = parameter.ds_process_group if distributed.get_world_size(parameter.ds_process_group) > 1 else None
            yield parameter, Piece(flat, int(offset), start, count, parameter.ds_shape, group)
