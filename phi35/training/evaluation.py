"""Evaluation during a training run: the loss on held-out data, and answers about pictures.

It changes nothing: dropout and routing noise are off, every generator goes back to where it was, and the held-out data
begins anew each time, so that two evaluations of the same weights give the same number, and a run with evaluations
makes the same steps as one without. Where the run keeps an average of its weights, that is evaluated.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed

from phi35.config import ModelConfig
from phi35.registry import resolve
from phi35.training.acceleration import fast_attention
from phi35.training.config import TrainingConfig
from phi35.training.engine import Engine
from phi35.training.microbatches import next_micro_batches
from phi35.training.random_state import random_state, restore_random_state


def check_evaluation(config: TrainingConfig, model_config: ModelConfig) -> None:
    """Checks that a run's evaluations can be made, before anything is allocated.

    Raises:
        ValueError: if they cannot.
    """
    if not config.eval_questions:
        return
    if model_config.vision is None:
        raise ValueError(f"eval_questions are about pictures, and {config.model!r} is text-only: set eval_questions=0")
    resolve("vision.easy_vqa:evaluation_questions")


class Evaluator:
    """Evaluates an engine's model; all ranks call it alike.

    Args:
        engine: whose model it is.
        source: of held-out data, at its beginning.
        num_samples: of one evaluation, rounded up to whole micro-batches of all ranks.
        processor: of the model, for questions.
        num_questions: of each kind of easy-vqa's questions; 0 for none.
        beat: called now and then.
    """

    def __init__(
        self,
        engine: Engine,
        source: Any,
        num_samples: int,
        *,
        processor: Any = None,
        num_questions: int = 0,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.source, self.processor, self.beat = engine, source, processor, beat
        config, place = engine.config, engine.environment
        assert config.micro_batch_size is not None
        per_pass = config.micro_batch_size * config.data_parallel_size(place.world_size)
        self.num_passes = math.ceil(num_samples / per_pass)
        self.num_samples, self.num_questions = self.num_passes * per_pass, num_questions
        self._start = source.state_dict()

    def __call__(self, step: int) -> dict[str, Any]:
        """The numbers of ``evaluations.jsonl``.

        Args:
            step: updates made.

        Returns:
            ``step``, ``loss`` (mean over the held-out label tokens), ``tokens``, ``samples``, and with questions
            ``accuracy`` and ``questions``; equal on all ranks.
        """
        with self._undisturbed():
            loss, tokens = self._held_out_loss()
            line: dict[str, Any] = {"step": step, "loss": loss, "tokens": tokens, "samples": self.num_samples}
            if self.num_questions:
                line |= self._answers()
        if self.engine.average is not None:
            line["weights"] = "average"
        return line

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode and the average in place; afterwards everything as it was."""
        model: Any = self.engine.model
        state, training = random_state(), model.training
        embedding = model.model.vision_embed_tokens
        average = self.engine.average
        swapped = contextlib.nullcontext() if average is None else average.in_place_of_weights()
        model.eval()
        if embedding is not None:
            always, embedding.run_tower_always = embedding.run_tower_always, True  # ranks make the same calls
        try:
            with swapped:
                yield
        finally:
            model.train(training)
            if embedding is not None:
                embedding.run_tower_always = always
            restore_random_state(state)

    @torch.no_grad()
    def _held_out_loss(self) -> tuple[float, int]:
        """Mean loss per label token over all ranks' held-out samples, and those tokens' number."""
        device, model = self.engine.environment.device, self.engine.model
        total = torch.zeros(2, dtype=torch.float64, device=device)
        self.source.load_state_dict(self._start)
        batches = self.source.compact() if hasattr(self.source, "compact") else iter(self.source)
        expand = getattr(self.source, "expand", None)
        try:
            for _ in range(self.num_passes):
                (batch,), (tokens,), _ = next_micro_batches(batches, 1, self.engine, expand, self.beat)
                with fast_attention(device):
                    batch = self.engine.objective.prepare(model, batch)
                    inputs = {**self.engine.objective.inputs(batch), "return_logits": False}
                    loss, _ = self.engine.objective.loss(model(**inputs), batch)
                total += torch.stack([loss.double() * tokens, torch.full_like(total[0], tokens)])
        finally:
            if hasattr(batches, "close"):
                batches.close()
        if self.engine.environment.world_size > 1:
            distributed.all_reduce(total)
        summed, count = total.tolist()
        return summed / max(1.0, count), round(count)

    def _answers(self) -> dict[str, Any]:
        """Share of easy-vqa's test questions that are answered right; every rank asks all of them."""
        evaluate = resolve("phi35.evaluation.demo:evaluate")
        result = evaluate(
            self.engine.model, self.processor, limit=self.num_questions, progress=lambda done, total: self.beat()
        )
        correct = sum(score.correct for score in result.scores)
        count = sum(score.count for score in result.scores)
        return {"accuracy": correct / count, "questions": count}
