"""Whether all ranks see one output folder: on several machines it must lie in a file system that they share."""

import os
import secrets
import socket
import time
from pathlib import Path

from phi35.training.environment import Environment

SECONDS = 30.0
"""A network file system may show a new file a little later elsewhere."""


def check_shared(folder: Path, place: Environment) -> None:
    """Makes the folder and sees to it that every rank has it before it; all ranks call this alike.

    Args:
        folder: of the run.
        place: this process's.

    Raises:
        ValueError: on all ranks, if it cannot be written or some do not see what rank 0 writes there.
    """
    token, problem = f".seen-by-all-{secrets.token_hex(8)}", None
    if place.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if place.world_size > 1:
                (folder / token).touch()
        except OSError as error:
            problem = f"output_dir {str(folder)!r} cannot be written ({error}); give another"
    token, problem = place.broadcast((token, problem))
    if problem is not None:
        raise ValueError(problem)
    if place.world_size == 1:
        return
    deadline = time.monotonic() + SECONDS
    while not (seen := (folder / token).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = place.gather((seen, socket.gethostname(), os.getcwd()))
    if place.is_main:
        (folder / token).unlink(missing_ok=True)
    blind = [f"rank {rank} on {host} in {cwd}" for rank, (sees, host, cwd) in enumerate(found) if not sees]
    if blind:
        raise ValueError(
            f"output_dir {str(folder)!r} is not the same folder for all processes: {', '.join(blind[:4])} "
            f"{'and others ' if len(blind) > 4 else ''}did not see what rank 0 wrote there; give an absolute path in a "
            "file system that all machines share"
        )
