"""Processes: what DeepSpeed expects of the environment, with and without its launcher."""

import datetime
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from phi35.training.slurm import place_in_step

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """This process's place in the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control_group: Any = None
    """Process group on the hosts for small plain values, beside a GPU's; None for the default one."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            distributed.barrier()

    def wait_for_main(self) -> None:
        """Waits for all ranks, however long rank 0 takes over work that it does alone."""
        if self.world_size > 1:
            distributed.monitored_barrier(group=self.control_group, timeout=datetime.timedelta(days=30))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain value on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, value, group=self.control_group)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value on every rank."""
        values = [value]
        if self.world_size > 1:
            distributed.broadcast_object_list(values, src=0, group=self.control_group)
        return values[0]


def start(device: str | None = None, timeout_seconds: float = 1800.0) -> Environment:
    """Joins the process group, as rank of a launcher (``deepspeed``, torchrun, srun) or as the only process.

    Nothing is compiled: DeepSpeed's shared-memory collectives for the CPU, which it would build on first use, are
    declared unavailable, and gloo does their work.

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is a device.
        timeout_seconds: after which a collective that not all ranks have joined is an error.

    Raises:
        ValueError: if only some of the launcher's variables are set, or there is no CUDA device to be had.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        os.environ.update(place_in_step(os.environ))
    present = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    launched = "RANK" in present or "WORLD_SIZE" in present
    if launched and len(present) < len(LAUNCHER_VARIABLES) and not distributed.is_initialized():
        missing = sorted(set(LAUNCHER_VARIABLES) - set(present))
        raise ValueError(
            f"the environment sets {present} but lacks {missing}; start with a launcher, or unset them all"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; leave it out or give 'cpu'")
    rank, local_rank, world_size = 0, 0, 1
    if launched:
        rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    deepspeed = _import_deepspeed()
    chosen = (
        torch.device("cpu")
        if device_type == "cpu"
        else torch.device("cuda", _gpu_index(local_rank, torch.cuda.device_count()))
    )
    if device_type == "cuda":
        os.environ["LOCAL_RANK"] = str(chosen.index)  # where DeepSpeed looks for it
        # Segments that grow leave no holes where activations of changing sizes come and go.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(chosen)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Half the cores: threads that wait for a busy core spin, which cost a shared machine a factor of ten.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // (2 * world_size)))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    deepspeed.init_distributed(dist_backend="nccl" if device_type == "cuda" else "gloo", verbose=False, timeout=timeout)
    on_gpus = device_type == "cuda" and world_size > 1
    control_group = distributed.new_group(backend="gloo", timeout=timeout) if on_gpus else None
    return Environment(
        rank=rank, local_rank=local_rank, world_size=world_size, device=chosen, control_group=control_group
    )


def stop() -> None:
    """Leaves the process group, if there is one; a lone process may then start another, at a free port of its own."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if os.environ.get("WORLD_SIZE") == "1":
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)


def _gpu_index(local_rank: int, count: int) -> int:
    """Of this process's GPU among those it sees: all of the machine's, or its own alone, as under srun."""
    if count == 1:
        return 0
    if local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this machine sees {count} GPUs: start one process per GPU, and let each see all "
            "of them or its own alone"
        )
    return local_rank


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch versions rename; nothing a user could do.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if isinstance(deepspeed.utils.logger, logging.Logger):
        deepspeed.utils.logger.setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
