"""Models under EleutherAI's lm-evaluation-harness (0.4.x): ``phi35 eval tasks``, or by hand

    model = HarnessModel(*phi35.load("folder"))
    lm_eval.simple_evaluate(model, tasks=["my_task"], task_manager=TaskManager(include_path="tasks"))

Requests run in batches of like length; those that differ in their last token alone (multiple choice by letter) share
one pass; the logits of continuations are the only ones that are made. Every row of a batch stands under the LongRoPE
factors of its own length. Log-likelihoods equal those of the harness's wrapper for transformers where that is right.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from phi35.generation.decoding import Decoding
from phi35.generation.streaming import text_of
from phi35.processor import Processor
from phi35.scoring import LOGITS_AT_ONCE

Request = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """A ``phi35.model.CausalLM`` as the harness asks it.

    Args:
        model: text is what it is asked about, a vision model too.
        processor: the model's.
        batch_size: rows that run together.
        max_length: tokens of a prompt and its continuation, of longer ones the last; by default the model's limit.
        max_gen_toks: most tokens of an answer where a task does not say.
        decoding: options of ``phi35.generation.decoding.generate`` for every answer (``rope_mode``, ...).

    Raises:
        ValueError: for sizes below 1, or a ``max_length`` past the model's.
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **decoding: Any,
    ) -> None:
        super().__init__()
        limit = model.config.max_position_embeddings
        problems = [
            f"{name} must be a whole number of at least 1, got {value!r}"
            for name, value in (("batch_size", batch_size), ("max_length", max_length), ("max_gen_toks", max_gen_toks))
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
        ]
        if not problems and max_length is not None and max_length > limit:
            problems.append(f"max_length {max_length} passes the model's {limit} positions")
        if problems:
            raise ValueError("; ".join(problems))
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.max_length = batch_size, max_length or limit
        self.max_gen_toks, self.decoding = max_gen_toks, decoding
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token_id = self.processor.tokenizer.eos_token_id
        assert token_id is not None
        return token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the begin-of-text token where there is one."""
        first = self.processor.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Stands in the names of cached requests."""
        return f"phi35-{self.processor.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; special tokens as the tokenizer's config says, unless told or already there."""
        tokenizer = self.processor.tokenizer
        first = tokenizer.bos_token_id
        if add_special_tokens is None:
            begin = None if first is None else tokenizer.decode([first], skip_special=False)
            add_special_tokens = not (begin and string.startswith(begin))
        return tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat's prompt, by the model's own template.

        Raises:
            ValueError: if the last message is to be continued, which no template of the family can.
        """
        if not add_generation_prompt:
            raise ValueError("the family's chat templates end every message: a reply that is begun cannot be continued")
        return self.processor.apply_chat_template(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the record of a run; None if it is not used."""
        return self.processor.tokenizer.chat_template if chat_template else None

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` that share one token."""
        parts: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                parts.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(parts, disable_tqdm), strict=True):
            sums[number] += logprob
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (request.args[0],), value)
        return sums

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation after its context, both as ids."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise ValueError(f"request {number} needs a context and a continuation of one token at least")
            rows.setdefault(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), []).append(number)
        order = sorted(rows, key=len, reverse=True)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods", unit=" requests") as bar:
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                states = self._last_states(batch, [self._longest(requests, rows[row]) for row in batch])
                for row, hidden in zip(batch, states, strict=True):
                    for number in rows[row]:
                        text, _, continuation = requests[number]
                        found[number] = self._score(hidden, continuation[-self.max_length :])
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, found[number])
                    bar.update(len(rows[row]))
        return found

    def _longest(self, requests: list[Request], numbers: Sequence[int]) -> int:
        return max(min(len(requests[number][2]), self.max_length) for number in numbers)

    def _last_states(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[torch.Tensor]:
        """Hidden states (n, D) before the last n tokens of each continuation."""
        batch = self.processor.pad([list(row) for row in rows])
        device = self.model.device
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        hidden = self.model.model(ids, attention_mask=mask)[0]
        return [hidden[index, hidden.shape[1] - count :] for index, count in enumerate(counts)]

    def _score(self, hidden: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """A continuation from the states (n, D) before its tokens."""
        total, greedy = 0.0, True
        targets = torch.tensor(continuation, device=hidden.device)
        width = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for states, labels in zip(hidden[-len(continuation) :].split(width), targets.split(width), strict=True):
            scores = self.model.lm_head(states).float().log_softmax(dim=-1)
            total += float(scores.gather(-1, labels[:, None]).double().sum())
            greedy = greedy and bool((scores.argmax(dim=-1) == labels).all())
        return total, greedy

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, each up to its stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers", unit=" requests") as bar:
            for numbers in groups.values():
                options = self._options(requests[numbers[0]].args[1])
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise ValueError(
                        f"answers of {options['max_new_tokens']} tokens leave a prompt no room in {self.max_length}"
                    )
                prompts = {number: self.tok_encode(requests[number].args[0])[-room:] for number in numbers}
                order = sorted(numbers, key=lambda number: len(prompts[number]), reverse=True)
                for first in range(0, len(order), self.batch_size):
                    batch = order[first : first + self.batch_size]
                    for number, text in zip(batch, self._answer([prompts[n] for n in batch], options), strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return answers

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation arguments as ours.

        Raises:
            ValueError: for arguments that have no counterpart.
        """
        left = dict(given)
        until = left.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        options: dict[str, Any] = {
            "stop": tuple(text for text in until if text),
            "max_new_tokens": next((int(length) for length in lengths if length is not None), self.max_gen_toks),
            "temperature": float(left.pop("temperature", 0.0) or 0.0),
        }
        if left.pop("do_sample", None) is False:
            options["temperature"] = 0.0
        for name in ("top_p", "top_k", "min_p", "repetition_penalty", "seed"):
            if left.get(name) is not None:
                options[name] = left[name]
            left.pop(name, None)
        if left:
            raise ValueError(f"generation arguments {sorted(left)} are unknown here; take them out of the task")
        return {**options, **self.decoding}

    def _answer(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        tokenizer = self.processor.tokenizer
        decoding = Decoding(self.model, **self.processor.pad(prompts), tokenizer=tokenizer, **options)
        while not decoding.done:
            decoding.step()
        return [text_of(tokenizer, decoding.new_ids(row), options["stop"]) for row in range(len(prompts))]


def evaluate(
    model: Any,
    processor: Processor,
    tasks: Sequence[str],
    *,
    include_path: Sequence[Path] = (),
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    cache: Path | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Runs tasks of the harness on a model.

    Args:
        model: a ``phi35.model.CausalLM``.
        processor: the model's.
        tasks: names of the harness's tasks, or of those under ``include_path``.
        include_path: folders with task files (YAML), whose data may be local files.
        batch_size: rows that run together.
        num_fewshot: examples before each question; None as the task says.
        limit: most questions of each task.
        chat: wrap each question by the model's chat template, examples as turns.
        cache: file (SQLite) that keeps answers, so that a second run asks nothing again.
        max_length: see ``HarnessModel``.

    Returns:
        What ``lm_eval.simple_evaluate`` returns.

    Raises:
        ValueError: for tasks that are not to be found.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    paths = [str(path) for path in include_path]
    manager = TaskManager(include_path=paths or None, include_defaults=not paths)
    if paths and set(tasks) - set(manager.all_tasks):
        manager = TaskManager(include_path=paths)  # reads some thousand files
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        shown = ", ".join(map(str, include_path)) or "no --include-path"
        raise ValueError(f"tasks {unknown or list(tasks)} are not to be found among the harness's own and in {shown}")
    asked = HarnessModel(model, processor, batch_size=batch_size, max_length=max_length)
    found = lm_eval.simple_evaluate(
        asked,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        use_cache=None if cache is None else str(cache),
        task_manager=manager,
    )
    assert found is not None
    return dict(found)
