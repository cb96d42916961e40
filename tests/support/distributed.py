"""Run a function on several gloo processes within a test, in a second or two.

The processes are forked from a server that has torch and DeepSpeed imported already, so that a test pays for the
fork and the rendezvous only. One server lives as long as the test session.

    def compare(rank, world_size, hidden_size):          # a module-level function of the test file
        ...
        return value                                     # picklable; tensors are fine

    def test_compare():
        first, second = run_distributed(compare, 2, 64)
"""

import ctypes
import faulthandler
import importlib.util
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "torch.distributed",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # brings in torch's compiler, some seconds of import
    "deepspeed.runtime.zero.stage3",
    "deepspeed.moe.layer",
    "phi35.training.run",
    "phi35.training.export",
    "matplotlib.backends.backend_agg",
    "tokenizers",
    "jinja2",
    "moe.expert_parallel",
    "moe.losses",
    "moe.presets",
    "vision.presets",
    "vision.embedding",
    "phi35.adapters.layers",  # brings in PEFT, five seconds of import
)
_PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """A rank raised or died; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0, init: bool = True
) -> list[Any]:
    """Calls ``function(rank, world_size, *args)`` on ``world_size`` processes with a gloo group between them.

    The function must be defined at the top level of its file: the child loads that file by its path, since test
    modules have no importable name under pytest's importlib mode. Arguments and results are pickled; tensors come
    back detached from the child's memory.

    Args:
        function: module-level function.
        world_size: number of processes.
        *args: further arguments, plain data or objects of importable modules.
        timeout: seconds until all ranks are killed.
        init: whether torch.distributed is initialised before the call (environment variables are always set).

    Returns:
        Each rank's result, in rank order.

    Raises:
        RankError: the first rank's failure, with its traceback; the other ranks are killed.
        TimeoutError: some rank did not finish; the message holds the stacks of those that hung.
    """
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} must be a module-level function: the ranks load it by name")
    path = str(Path(function.__code__.co_filename).resolve())
    context = _context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = _free_port()
        processes, receivers = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            call = (path, function.__qualname__, pickle.dumps(args))
            process = context.Process(
                target=_rank_main, args=(sender, call, rank, world_size, port, folder, init), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        try:
            return _collect(processes, receivers, time.monotonic() + timeout, folder)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _context() -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _collect(processes: list[Any], receivers: list[Connection], deadline: float, folder: str) -> list[Any]:
    results: dict[int, Any] = {}
    pending: dict[Connection, int] = {receiver: rank for rank, receiver in enumerate(receivers)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(
                f"ranks {sorted(pending.values())} did not finish\n{_stacks(processes, pending, folder)}"
            )
        for receiver in ready:
            rank = pending.pop(receiver)  # type: ignore[call-overload]
            try:
                succeeded, payload = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RankError(f"rank {rank} failed:\n{payload}")
            results[rank] = pickle.loads(payload)
    return [results[rank] for rank in range(len(processes))]


def _stacks(processes: list[Any], pending: dict[Connection, int], folder: str) -> str:
    """Asks hung ranks for their stacks through the handler that ``_rank_main`` registered."""
    texts = []
    for rank in sorted(pending.values()):
        if processes[rank].is_alive():
            os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    for rank in sorted(pending.values()):
        path = Path(folder, f"stacks-{rank}")
        texts.append(f"--- rank {rank} ---\n{path.read_text() if path.exists() else '(no stacks)'}")
    return "\n".join(texts)


def _rank_main(
    sender: Connection, call: tuple[str, str, bytes], rank: int, world_size: int, port: int, folder: str, init: bool
) -> None:
    if sys.platform == "linux":  # the test session's death ends the server, and this ends the rank with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Daemonic ranks die with the test session, but may have no children, and some tests read with worker processes.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    faulthandler.register(signal.SIGUSR1, file=open(Path(folder, f"stacks-{rank}"), "w"))
    try:
        value = _call(call, rank, world_size, port, folder, init)
        buffer = io.BytesIO()
        pickle.dump(value, buffer)  # plain pickle: torch's own reducers would share memory with a dying process
        message = (True, buffer.getvalue())
    except BaseException:
        message = (False, traceback.format_exc())
    sender.send(message)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the process group's threads need no orderly end


def _call(call: tuple[str, str, bytes], rank: int, world_size: int, port: int, folder: str, init: bool) -> Any:
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TQDM_DISABLE="1")
    import torch
    from deepspeed.ops import __compatible_ops__

    torch.set_num_threads(1)
    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled on first use
    path, name, packed_args = call
    function = _load(Path(path), name)
    if init:
        import datetime

        import deepspeed

        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return function(rank, world_size, *pickle.loads(packed_args))


def _load(path: Path, name: str) -> Callable[..., Any]:
    module_name = f"_ranks_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
