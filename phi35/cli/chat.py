"""``phi35 chat``: a conversation on standard input, by hand or through a pipe."""

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

HELP = "/image PATH adds a picture to the next question, /reset starts anew, /exit ends, /help shows this."


def chat(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; default: PHI35_MODEL, else the small one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Text of a system turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 for greedy, else sampling.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set with this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    quantization: Annotated[str | None, typer.Option(help="int4, int8 or fp8: round weights as they are read.")] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Device memory for experts (40GB); others on the host.")
    ] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="int8 or fp8: keys and values in eight bits.")] = None,
) -> None:
    """Talk with a model: a line is a turn; /help lists the commands."""
    from phi35 import api

    loaded = api.resolve_model(model, device, dtype, quantization, expert_memory)
    conversation = Conversation(
        loaded,
        system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        kv_cache_dtype=kv_cache_dtype,
    )
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    for line in _lines(interactive):
        if line == "/exit":
            break
        try:
            for piece in conversation.take(line):
                print(piece, end="", flush=True)
        except ValueError as error:
            # A mistake in one line must not end the conversation.
            print(f"error: {error}", file=sys.stderr)
        print(flush=True)  # also after a mistake: in a pipe, each line of input has its line of output


class Conversation:
    """The turns and pictures so far.

    Args:
        model: (model, processor).
        system: text of a system turn, or None.
        **options: of decoding (``phi35.generation.decoding.DecodingOptions``).

    Attributes:
        reader: keeps the turns that the model has read, so that each new turn reads what is new.
    """

    def __init__(self, model: tuple[Any, Any], system: str | None = None, **options: Any) -> None:
        from phi35.generation.growing_prompts import GrowingPrompts

        self.model, self.system, self.options = model, system, options
        self.reader = GrowingPrompts(*model, kv_cache_dtype=self.options.pop("kv_cache_dtype", None))
        self.reset()

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.messages: list[dict[str, str]] = []
        self.images: list[str] = []
        self._num_shown = 0

    def take(self, line: str) -> Iterable[str]:
        """What a line of input gives back: pieces of an answer, or one notice.

        Raises:
            ValueError: for an unknown command, a bad picture, or whatever generation refuses; the turn is dropped.
        """
        command, _, argument = line.partition(" ")
        if command == "/help":
            return [HELP]
        if command == "/reset":
            self.reset()
            return ["(started anew)"]
        if command == "/image":
            return [self._add_image(argument.strip())]
        if command.startswith("/"):
            raise ValueError(f"unknown command {command!r}. {HELP}")
        return self._answer(line)

    def _add_image(self, path: str) -> str:
        processor = self.model[1]
        if processor.config.vision is None:
            raise ValueError("this model reads text only")
        # As the question will: a picture that only fails there would spoil every question after it.
        processor.image_transform(path)
        self.images.append(path)
        return f"(picture {len(self.images)}: {path})"

    def _answer(self, question: str) -> Iterator[str]:
        from phi35 import api
        from phi35.chat_template import image_tag

        tags = "".join(image_tag(number + 1) + "\n" for number in range(self._num_shown, len(self.images)))
        turn = {"role": "user", "content": tags + question}
        processor = self.model[1]
        messages = [*self.messages, turn]
        text, images = api.chat_text(processor, messages, self.images or None, self.system)
        api.refuse_tags_without_images(processor, text)
        pieces = []
        for piece in self.reader.answer(processor(text, images=images), **self.options):
            pieces.append(piece)
            yield piece
        self.messages += [turn, {"role": "assistant", "content": "".join(pieces)}]
        self._num_shown = len(self.images)


def _lines(interactive: bool) -> Iterator[str]:
    """Non-empty lines of standard input until its end."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line:
            yield line
