"""The one place where sparse layers meet DeepSpeed: its expert groups, and the class by which it knows such layers.

DeepSpeed recognises sparse layers by its own class: a layer that only marks its parameters is not seen, and ZeRO-1 and
-2 fail on it. So a sharded layer's class gains ``deepspeed.moe.layer.MoE`` as a last base, whose ``__init__`` never
runs; parameter names do not change. Groups are looked up by name where they are used, since a module that held one
could not be copied.
"""

import functools
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def create_expert_groups(ep_size: int) -> str:
    """Makes DeepSpeed's groups of ``ep_size`` processes, where they do not stand yet; all processes call it.

    Returns:
        The name under which ``expert_group`` and DeepSpeed's optimizer find them.

    Raises:
        ValueError: if there are no process groups yet.
    """
    from deepspeed import comm
    from deepspeed.utils import groups

    if not comm.is_initialized():
        raise ValueError("expert parallelism needs process groups: call deepspeed.init_distributed() first")
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return name


def expert_group(name: str) -> "ProcessGroup":
    """The processes that share one set of experts with this one."""
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(name)


def expert_data_group(name: str) -> "ProcessGroup":
    """The processes that hold copies of this one's experts."""
    from deepspeed.utils import groups

    return groups._get_expert_data_parallel_group(name)


@functools.cache
def recognised_class(*bases: type[nn.Module]) -> type[nn.Module]:
    """A class made of ``bases`` that DeepSpeed takes for a sparse layer of its own.

    For layers whose experts are trained: ZeRO refuses a model with such layers and no expert to optimize.
    """
    from deepspeed.moe.layer import MoE

    return type(f"ExpertParallel{bases[-1].__name__}", (_StandingGroups, *bases, MoE), {})


@functools.cache
def plain_class(*bases: type[nn.Module]) -> type[nn.Module]:
    """The same class for layers whose experts are frozen, which DeepSpeed need not see."""
    return type(f"ExpertParallel{bases[-1].__name__}", bases, {})


class _StandingGroups:
    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed asks every sparse layer to make its groups; ``create_expert_groups`` has made them."""
