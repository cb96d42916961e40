"""The loop of a training run: batches to the device, updates, metrics, checkpoints."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from phi35.training.best import BestCheckpoints
from phi35.training.checkpoint_files import complete_checkpoints, folder_name
from phi35.training.console import warn
from phi35.training.engine import Engine
from phi35.training.environment import Environment
from phi35.training.evaluation import Evaluator
from phi35.training.health import Health, RunDiverged, Trouble
from phi35.training.metrics import Metrics
from phi35.training.microbatches import next_micro_batches
from phi35.training.rollback import Rollbacks
from phi35.training.saving import CheckpointSaver, SaveError
from phi35.training.stopping import Agreement, RunStopped, StopRequest
from phi35.training.watchdog import Watchdog


def run_steps(
    engine: Engine,
    source: Any,
    metrics: Metrics,
    first_step: int,
    root: Path,
    state: dict[str, Any],
    watchdog: Watchdog,
    health_state: dict[str, Any] | None = None,
    evaluator: Evaluator | None = None,
    best_state: dict[str, Any] | None = None,
) -> Path:
    """The loop: ``max_steps`` updates, a checkpoint now and then and one at the end.

    Args:
        engine: with the state of ``first_step``.
        source: this rank's micro-batches.
        metrics: takes each step's numbers.
        first_step: updates made before.
        root: folder of the checkpoints, in the run's folder.
        state: plain data to keep in each checkpoint.
        watchdog: of this rank, entered.
        health_state: of the checkpoint that the run goes on from.
        evaluator: makes the evaluations that the config asks for.
        best_state: of the checkpoint that the run goes on from.

    Returns:
        The last checkpoint's folder.

    Raises:
        RunStopped: on all ranks, if a signal or the launcher's death ended the run; a checkpoint is saved.
        SaveError: on all ranks, if the last checkpoint could not be written.
        RunDiverged: on all ranks, if too many updates in a row were left out, or rollbacks did not help.
    """
    config = engine.config
    with StopRequest() as stop, watchdog.expect_progress(stop):
        best = BestCheckpoints(config.keep_best)
        best.load_state(best_state)
        saver = CheckpointSaver(
            root,
            engine,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            asynchronous=config.async_save,
            beat=watchdog.beat,
            protected=best.steps,
        )
        health, rollbacks = Health(config), Rollbacks(root, engine, first_step)
        health.load_state(health_state)
        metrics.num_skipped = health.num_skipped
        if evaluator is not None:
            evaluator.beat = watchdog.beat
        loop = _Loop(source, metrics, saver, health, rollbacks, stop, watchdog, evaluator, best)
        try:
            loop.run(first_step, state)
        finally:
            loop.close()
    return saver.last or root / folder_name(first_step)


class _Loop:
    """The steps of one process, with what watches over them."""

    def __init__(
        self,
        source: Any,
        metrics: Metrics,
        saver: CheckpointSaver,
        health: Health,
        rollbacks: Rollbacks,
        stop: StopRequest,
        watchdog: Watchdog,
        evaluator: Evaluator | None,
        best: BestCheckpoints,
    ) -> None:
        self.source, self.metrics, self.saver, self.health, self.rollbacks = source, metrics, saver, health, rollbacks
        self.engine, self.stop, self.watchdog = saver.engine, stop, watchdog
        self.evaluator, self.best = evaluator, best
        self.config, self.environment = self.engine.config, self.engine.environment
        self.agreement = Agreement(self.environment)
        self.children = {process.pid for process in multiprocessing.active_children()}
        self.batches = source.compact() if hasattr(source, "compact") else iter(source)

    def run(self, first_step: int, state: dict[str, Any]) -> None:
        done = first_step
        while done < self.config.max_steps:
            self.agreement.begin([self.stop.signal_number, self.saver.in_flight and not self.saver.is_written])
            self._update(done)
            done += 1
            signal_number, unwritten = self.agreement.end()
            if self.saver.in_flight and not unwritten:
                self._saving(self.saver.finish, is_last=False)
            interval = self.config.save_interval
            is_last = done == self.config.max_steps or signal_number > 0
            is_due = is_last or bool(interval and done % interval == 0)
            evaluates = self._evaluates(done) and not signal_number
            if is_due or evaluates:
                self.metrics.flush()  # before a checkpoint the numbers are read: none is made of a run that is not well
            outcomes = self.metrics.take_outcomes()
            self.engine.note_skipped(sum(not outcome.is_finite for outcome in outcomes))
            trouble = self.health.observe(outcomes)
            if trouble is not None:
                done = self._handle(trouble, done)
            else:
                is_best = evaluates and self._evaluate(done)
                if is_due or is_best:
                    self._save(done, state, is_last)
            if signal_number:
                reason = self.stop.reason or "another process was asked to stop"
                raise RunStopped(f"{reason}: stopped after step {done}, saved as {self._newest()}", signal_number)

    def close(self) -> None:
        """Ends data-loading processes and threads."""
        if hasattr(self.batches, "close"):
            self.batches.close()
        for process in multiprocessing.active_children():  # data loaders that did not end when they were told to
            if process.daemon and process.pid not in self.children:
                process.kill()
        self.saver.close()

    def _update(self, step: int) -> None:
        accumulation = self.config.gradient_accumulation_steps(self.environment.world_size)
        expand = getattr(self.source, "expand", None)
        micro_batches, num_tokens, work = next_micro_batches(
            self.batches, accumulation, self.engine, expand, self.watchdog.beat
        )
        global_num_tokens = _sum_over_ranks(sum(num_tokens), self.environment)
        learning_rate = self.engine.set_learning_rate(step)
        result = self.engine.step(micro_batches, num_tokens, global_num_tokens)
        self.watchdog.beat()
        self.metrics.add(
            step + 1,
            result,
            learning_rate=learning_rate,
            learning_rates=self.engine.learning_rates,
            work=work,
            num_tokens=global_num_tokens,
            num_samples=self.config.global_batch_size,
            attention_masks=[batch.get("attention_mask") for batch in micro_batches],
        )

    def _evaluates(self, done: int) -> bool:
        interval = self.config.eval_interval
        return self.evaluator is not None and (done % interval == 0 or done == self.config.max_steps)

    def _evaluate(self, done: int) -> bool:
        """Evaluates; says whether the checkpoint of this step is among the best, which stay."""
        assert self.evaluator is not None
        line, before = self.evaluator(done), self.best.lowest
        kept = self.best.observe(done, line["loss"])
        self.metrics.add_evaluation({**line, "best": before is None or line["loss"] < before})
        self.metrics.restart_clock()
        return kept

    def _handle(self, trouble: Trouble, done: int) -> int:
        """Ends the run, or goes back to a checkpoint from before the trouble; returns the updates made by then.

        The data goes on where it is, so that what led to the trouble is left out.
        """
        self._saving(self.saver.finish, is_last=False)
        if trouble.action == "stop":
            raise RunDiverged(f"{trouble.reason}; the newest checkpoint is {self._newest()}")
        step = self.rollbacks.roll_back(trouble, done)
        if step < done:
            self.health.rolled_back()
            self.metrics.rewind(step)
            self.best.rewind(step)
        return step

    def _newest(self) -> Path | None:
        found = complete_checkpoints(self.saver.root)
        return found[-1] if found else None

    def _save(self, done: int, state: dict[str, Any], is_last: bool) -> None:
        now = {
            "data": self.source.state_dict(),
            "selection_bias": self.engine.balancer.state(),
            "health": self.health.state(),
            "best": self.best.state(),
        }
        self._saving(self.saver.finish, is_last=False)  # should the one before fail, this one is tried all the same
        self._saving(lambda: self.saver.save(done, {**state, **now}), is_last)
        if is_last:
            self._saving(self.saver.finish, is_last)
        self.metrics.restart_clock()

    def _saving(self, action: Callable[[], None], is_last: bool) -> None:
        """A checkpoint that cannot be written ends a run at its end alone; before, the next one may succeed."""
        try:
            action()
        except SaveError as error:
            if is_last:
                raise
            if self.environment.is_main:
                warn(f"{error}; the run goes on")


def _sum_over_ranks(value: int, place: Environment) -> torch.Tensor | int:
    """Sum of a count over ranks, at least 1; on a GPU it stays there, so that nobody waits for it."""
    if place.world_size == 1:
        return max(1, value)
    total = torch.tensor(float(value), device=place.device)
    distributed.all_reduce(total)
    return total.clamp(min=1)
