"""A process's place in a run that SLURM's ``srun`` started, told in the variables that launchers set.

``srun python scripts/train_moe.py`` starts every rank itself. It says in ``SLURM_*`` which one each is; DeepSpeed and
torch look for ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. Only what a job step sets
is read: the batch script itself sees ``SLURM_NTASKS`` and ``SLURM_PROCID`` too, and is no rank.
"""

import re
from collections.abc import Mapping

STEP_VARIABLES = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
FIRST_PORT, NUM_PORTS = 20_000, 10_000


def place_in_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables of a task of ``srun``, without those that ``environ`` sets already.

    Args:
        environ: of the process.

    Returns:
        Empty where ``srun`` started this process alone, or did not start it.

    Raises:
        ValueError: if the step's own variables are incomplete or contradict each other.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    missing = [name for name in STEP_VARIABLES if not environ.get(name)]
    if missing:
        raise ValueError(
            f"srun started {environ['SLURM_STEP_NUM_TASKS']} tasks, but the environment lacks {missing}; give RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT yourself, or start with torchrun"
        )
    world_size, rank = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_PROCID"])
    if not 0 <= rank < world_size:
        raise ValueError(f"SLURM_PROCID is {rank}, of {world_size} tasks (SLURM_STEP_NUM_TASKS)")
    step = int(environ.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        # The same on all nodes without asking anyone, and another for each job and step.
        "MASTER_PORT": str(FIRST_PORT + (int(environ["SLURM_JOB_ID"]) * 7 + step) % NUM_PORTS),
    }
    return {name: value for name, value in found.items() if name not in environ}


def first_host(node_list: str) -> str:
    """The first host of a SLURM list such as ``gpu[03-05,9],login1``: ``gpu03``.

    Args:
        node_list: as SLURM writes it.

    Raises:
        ValueError: if it is not such a list.
    """
    first = re.match(r"(?:[^\[\],\s]|\[[^\[\]\s]+\])+(?=,|$)", node_list.strip())
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""
    if not host:
        raise ValueError(f"expected a list of hosts as SLURM writes them, such as node[01-04], got {node_list!r}")
    return host
