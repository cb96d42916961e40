"""Saving checkpoints, at once or beside the training.

Every rank copies its share of the tensors to host memory and writes its own files; when all ranks' files are on disk,
rank 0 writes the manifest and gives the folder its name. Saving asynchronously, a thread of each rank writes while
the next steps run; that all are done is learnt between two steps, so that no thread needs a collective.
"""

import json
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from phi35.training import checkpoint_files as files
from phi35.training.console import warn
from phi35.training.engine import Engine
from phi35.training.environment import Environment
from phi35.training.optimizer_state import OptimizerState
from phi35.training.parameter_groups import kept_parameters
from phi35.training.random_state import random_state
from phi35.training.tensor_writer import HostBuffers, TensorWriter, write_hashed


class SaveError(OSError):
    """A checkpoint could not be written; the message says why, and what is left."""


class CheckpointSaver:
    """Writes a run's checkpoints below one folder, on one file system; all ranks call it alike.

    Args:
        root: folder of the run's checkpoints.
        engine: whose weights and moments are saved.
        keep_last: older checkpoints beyond this number are removed; 0 keeps all.
        keep_every: checkpoints of every this-many-th step stay for good; 0 for none.
        asynchronous: write in a thread; at most one checkpoint is in flight.
        beat: called now and then while a save makes progress.
        protected: steps whose checkpoints stay whatever else is said.

    Attributes:
        last: the newest checkpoint that was completed here; None before.
        seconds_waited: how long the last ``save`` kept the training waiting.
    """

    def __init__(
        self,
        root: str | Path,
        engine: Engine,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        asynchronous: bool = False,
        beat: Callable[[], None] = lambda: None,
        protected: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.root, self.engine, self.environment = Path(root), engine, engine.environment
        self.keep_last, self.keep_every, self.asynchronous, self.beat = keep_last, keep_every, asynchronous, beat
        self.protected = protected
        self.last: Path | None = None
        self.seconds_waited = 0.0
        self._buffers = HostBuffers(pinned=engine.environment.device.type == "cuda")
        self._in_flight: _Writing | None = None
        self._removal: threading.Thread | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint has been begun and not completed."""
        return self._in_flight is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of the checkpoint in flight is on disk, or has failed."""
        return self._in_flight is not None and not self._in_flight.thread_is_alive()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves; asynchronously, returns when everything is copied to host memory.

        A checkpoint that is still in flight is completed first.

        Args:
            step: updates made.
            state: plain data to keep (data position, configs).

        Raises:
            SaveError: on all ranks, if this or the earlier checkpoint could not be written.
        """
        started = time.perf_counter()
        self.finish()
        folder = self._begin(step)
        optimizer = OptimizerState(self.engine)
        world_size = self.environment.world_size
        trainer = {**state, "step": step, "optimizer_steps": optimizer.num_steps, "world_size": world_size}
        if self.engine.average is not None:
            trainer["average_updates"] = self.engine.average.num_updates
        writing = _Writing(folder, step, json.dumps(trainer, indent=1))
        self._in_flight = writing
        writing.writer = self._copy(writing, optimizer)
        random_file = folder / files.random_file(self.environment.rank)
        writing.start(random_file, random_state(), threaded=self.asynchronous)
        if not self.asynchronous:
            self.finish()
        self.seconds_waited = time.perf_counter() - started

    def finish(self) -> None:
        """Waits for the checkpoint in flight, if any, and completes it.

        Raises:
            SaveError: on all ranks, if it could not be written.
        """
        if self._in_flight is None:
            return
        writing, self._in_flight = self._in_flight, None
        writing.join(self.beat)
        assert writing.writer is not None
        mine = (writing.writer.pieces, {**writing.writer.files, **writing.files}, writing.problem)
        gathered = self.environment.gather(mine)
        problems = [f"rank {rank}: {problem}" for rank, (_, _, problem) in enumerate(gathered) if problem]
        if self.environment.is_main and not problems:
            problems = self._commit(writing, gathered)
        problems = self.environment.broadcast(problems)
        if problems:
            if self.environment.is_main:
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise SaveError(self._message(writing.step, problems))
        self.last = self.root / files.folder_name(writing.step)

    def close(self) -> None:
        """Waits until outdated checkpoints are gone."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _begin(self, step: int) -> Path:
        self.close()
        problem = None
        if self.environment.is_main:
            try:
                files.begin(self.root, step)
            except OSError as error:
                problem = str(error)
        problem = self.environment.broadcast(problem)
        if problem is not None:
            raise SaveError(self._message(step, [problem]))
        return files.writing_folder(self.root, step)

    @torch.no_grad()
    def _copy(self, writing: "_Writing", optimizer: OptimizerState) -> TensorWriter:
        """Gathers all tensors, in the same order on every rank, and copies this rank's share of them."""
        kept = kept_parameters(self.engine.model, self.engine.config)
        mine = dict(shares(kept, self.environment, self.engine.config.ep_size or 1))
        expected = sum(
            4 * _numel(parameter) * len(optimizer.kinds_of(parameter)) for name, parameter in kept if mine[name]
        )
        writer = TensorWriter(
            writing.folder,
            f"{self.environment.rank:05d}",
            expected_bytes=expected,
            buffers=self._buffers,
            deferred=self.asynchronous,
        )
        for name, parameter in kept:
            self.beat()
            for kind in optimizer.kinds_of(parameter):
                value = optimizer.read(parameter, kind)
                if mine[name] and not writing.problem:
                    offset, rows = getattr(parameter, "expert_shard", (0, None))
                    with writing.noting_problems():  # the other ranks still wait for this one's part of a gather
                        writer.add(kind, name, value, offset=offset, rows=rows)
        with writing.noting_problems():
            for kind, name, value in optimizer.own_tensors():
                writer.add(kind, name, value)
            writer.finish_copies()
        return writer

    def _commit(self, writing: "_Writing", gathered: list[Any]) -> list[str]:
        """Completes the folder on rank 0; returns what went wrong."""
        pieces = [piece for rank_pieces, _, _ in gathered for piece in rank_pieces]
        described = {name: entry for _, rank_files, _ in gathered for name, entry in rank_files.items()}
        try:
            files.commit(writing.folder, writing.step, trainer=writing.trainer, pieces=pieces, files=described)
        except OSError as error:
            return [str(error)]
        self._remove_outdated()
        return []

    def _remove_outdated(self) -> None:
        removed = []
        try:
            for old in files.outdated(self.root, self.keep_last, self.keep_every, self.protected()):
                removed.append(files.hide(old))
        except OSError as error:
            warn(f"an outdated checkpoint stays: {error}")
        if removed:
            self._removal = threading.Thread(target=_remove, args=(removed,), name="checkpoint-removal")
            self._removal.start()

    def _message(self, step: int, problems: list[str]) -> str:
        found = files.complete_checkpoints(self.root)
        left = f"the newest complete checkpoint is {str(found[-1])!r}" if found else "there is no earlier checkpoint"
        return f"the checkpoint after step {step} could not be written ({'; '.join(problems)}); {left}"


class _Writing:
    """One checkpoint on its way to the disk, as one rank sees it."""

    def __init__(self, folder: Path, step: int, trainer: str) -> None:
        self.folder, self.step, self.trainer = folder, step, trainer
        self.writer: TensorWriter | None = None
        self.files: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None
        self._thread: threading.Thread | None = None

    def start(self, random_file: Path, state: dict[str, torch.Tensor], *, threaded: bool) -> None:
        if not threaded:
            self._write(random_file, state)
            return
        self._thread = threading.Thread(target=self._write, args=(random_file, state), name="checkpoint", daemon=True)
        self._thread.start()

    def thread_is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self, beat: Callable[[], None]) -> None:
        while self.thread_is_alive():
            assert self._thread is not None
            self._thread.join(timeout=1.0)
            beat()

    def noting_problems(self) -> "_NotingProblems":
        return _NotingProblems(self)

    def _write(self, random_file: Path, state: dict[str, torch.Tensor]) -> None:
        assert self.writer is not None
        with self.noting_problems():
            if not self.problem:
                self.files[random_file.name] = write_hashed(random_file, state)
                self.writer.write_all()
        if self.problem:
            self.writer.drop()


class _NotingProblems:
    """Turns an error into ``problem``, so that it reaches all ranks when they meet."""

    def __init__(self, writing: _Writing) -> None:
        self.writing = writing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        expected = isinstance(error, OSError)
        self.writing.problem = str(error) if expected else "".join(traceback.format_exception(error))
        return True


def save(
    root: str | Path, step: int, engine: Engine, state: dict[str, Any], keep_last: int = 0, keep_every: int = 0
) -> Path:
    """Writes one checkpoint and waits for it; all ranks call it.

    Args:
        root: folder of the run's checkpoints.
        step: updates made.
        engine: whose weights and moments are saved.
        state: plain data to keep with them (data position, configs).
        keep_last: see ``CheckpointSaver``.
        keep_every: see ``CheckpointSaver``.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: if it could not be written.
    """
    saver = CheckpointSaver(root, engine, keep_last=keep_last, keep_every=keep_every)
    saver.save(step, state)
    saver.close()
    engine.environment.barrier()
    assert saver.last is not None
    return saver.last


def shares(named: Any, environment: Environment, ep_size: int) -> Iterator[tuple[str, bool]]:
    """Which tensors this rank writes: of whole ones each rank a like amount, of experts a rank that holds them.

    Args:
        named: (name, parameter) pairs, the same on every rank but for the experts' values.
        environment: this process's place.
        ep_size: ranks that share one set of experts; rank r holds part r modulo ``ep_size``.
    """
    world_size, rank = environment.world_size, environment.rank
    loads = [0] * world_size
    num_replicas = world_size // ep_size
    experts: list[tuple[str, Any]] = []
    whole: list[tuple[str, Any]] = []
    for name, parameter in named:
        (whole if getattr(parameter, "allreduce", True) else experts).append((name, parameter))
    for place, (name, parameter) in enumerate(experts):
        replica = place % num_replicas
        for part in range(ep_size):
            loads[replica * ep_size + part] += parameter.numel()
        assert parameter.expert_shard[0] == rank % ep_size * parameter.shape[0], "experts lie in another order"
        yield name, rank // ep_size == replica
    for name, parameter in sorted(whole, key=lambda pair: -_numel(pair[1])):  # the largest first balance best
        owner = loads.index(min(loads))
        loads[owner] += _numel(parameter)
        yield name, owner == rank


def _numel(parameter: Any) -> int:
    """Elements of a parameter on this rank's side of expert parallelism, also where ZeRO-3 has cut it up."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # what stays is hidden, and goes at the next save
