"""Going back to a checkpoint within a run, leaving out the data that led to trouble."""

from pathlib import Path

from phi35.training import checkpoint
from phi35.training import checkpoint_files as files
from phi35.training.console import warn
from phi35.training.engine import Engine
from phi35.training.health import RunDiverged, Trouble
from phi35.training.line_file import LineFile


class Rollbacks:
    """Chooses and loads the checkpoint to go back to; all ranks call it alike.

    A second trouble before another checkpoint was saved goes back further: the first choice may have been bad already.

    Args:
        root: folder of the run's checkpoints; the run's folder, above it, gets ``events.jsonl``.
        engine: whose state is put back.
        first_step: updates made before.
    """

    def __init__(self, root: Path, engine: Engine, first_step: int) -> None:
        self.root, self.engine = root, engine
        self._last: int | None = None
        self._count = 0
        path = root.parent / "events.jsonl"
        self._events = LineFile(path, first_step) if engine.environment.is_main else None

    def roll_back(self, trouble: Trouble, done: int) -> int:
        """Puts everything but the data back.

        Args:
            trouble: why.
            done: updates made.

        Returns:
            The updates made by then; ``done`` where there is nothing to go back to and the run may go on.

        Raises:
            RunDiverged: on all ranks, where it may not.
        """
        place, config = self.engine.environment, self.engine.config
        problem, is_final = place.broadcast(self._prepare(trouble) if place.is_main else None)
        if problem is not None:
            if is_final or not trouble.may_go_on:
                raise RunDiverged(f"{trouble.reason}; {problem}")
            self._tell(f"{trouble.reason}; {problem}, and the run goes on")
            return done
        reader = checkpoint.open_newest(self.root, place)
        assert reader is not None
        checkpoint.restore(self.engine, reader)
        step = int(reader.trainer["step"])
        self._last = step
        self._tell(
            f"{trouble.reason}; the run goes back to {reader.folder} and leaves out the "
            f"{(done - step) * config.global_batch_size} samples since"
        )
        if self._events is not None:
            self._events.append([{"step": step, "event": "rollback", "from_step": done, "reason": trouble.reason}])
        place.barrier()
        return step

    def _prepare(self, trouble: Trouble) -> tuple[str | None, bool]:
        """Rank 0: leaves the checkpoint to go back to as the newest one, or says why not, and whether that is final."""
        found = files.complete_checkpoints(self.root)
        good = [folder for folder in found if files.step_of(folder) < trouble.step]
        if not good:
            return "there is no checkpoint from before to go back to", False
        if self._last is not None and files.step_of(found[-1]) > self._last:
            self._last, self._count = None, 0
        self._count += 1
        if self._count > self.engine.config.max_rollbacks:
            return f"{self._count - 1} rollbacks led to no new checkpoint (max_rollbacks)", True
        older = [folder for folder in good if self._last is not None and files.step_of(folder) < self._last]
        target = (older or good)[-1]
        for folder in found[found.index(target) + 1 :]:
            files.put_aside(folder, "rolled-back")
        return None, False

    def _tell(self, text: str) -> None:
        if self.engine.environment.is_main:
            warn(text)
