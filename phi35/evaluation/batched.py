"""Short answers, greedy or drawn, to many questions about few pictures.

Each picture goes through the tower once and its features serve every question; questions of like length run
together. The answers are those of ``phi35.generate``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi35.processor import IMAGE_TAG, Processor


@dataclass(frozen=True)
class Question:
    """A prompt as ``phi35.generate`` takes it, with every image tagged, and the keys of its pictures."""

    prompt: str
    pictures: tuple[Any, ...]


@torch.inference_mode()
def answer(
    model: Any,
    processor: Processor,
    questions: Sequence[Question],
    pictures: Mapping[Any, Any],
    *,
    batch_size: int = 256,
    max_new_tokens: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answers, in the order of the questions.

    Args:
        model: a ``phi35.model.CausalLM`` with vision, in eval mode while this runs.
        processor: the model's.
        questions: what to ask.
        pictures: by key, anything ``Processor`` takes as an image.
        batch_size: questions that run together.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token; else tokens are drawn from the scores divided by it.
        seed: of what is drawn.
        progress: called with the number of questions answered since the last call.

    Raises:
        ValueError: if a question names a picture that is not there, or for a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    missing = sorted({str(key) for question in questions for key in question.pictures if key not in pictures})
    if missing:
        raise ValueError(f"questions ask about pictures that were not given: {missing[:10]}")
    draw = torch.Generator(model.device).manual_seed(seed)
    training = model.training
    model.eval()
    try:
        used = list(dict.fromkeys(key for question in questions for key in question.pictures))
        features = dict(zip(used, _features(model, processor, [pictures[key] for key in used]), strict=True))
        rows = [_ids(processor, question, features) for question in questions]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        answers = [""] * len(rows)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            row_features = [features[key] for index in chosen for key in questions[index].pictures]
            batch = processor.pad([rows[index] for index in chosen])
            new = _new_tokens(model, batch, row_features, max_new_tokens, temperature, draw)
            for index, ids in zip(chosen, new, strict=True):
                answers[index] = processor.decode(ids)
            if progress is not None:
                progress(len(chosen))
        return answers
    finally:
        model.train(training)


def _features(model: Any, processor: Processor, pictures: Sequence[Any]) -> list[torch.Tensor]:
    """Features (tokens_i, D) of every picture."""
    features: list[torch.Tensor] = []
    for first in range(0, len(pictures), 64):
        part = pictures[first : first + 64]
        crops = processor.crops(part, [processor.num_crops] * len(part))
        pixel_values = torch.cat([crop.pixel_values for crop in crops]).to(model.device, model.dtype)
        sizes = torch.tensor([tuple(crop.image_size) for crop in crops])
        features += model.image_features(pixel_values, sizes)
    return features


def _ids(processor: Processor, question: Question, features: Mapping[Any, torch.Tensor]) -> list[int]:
    """Prompt ids with -i standing for picture i, as the processor makes them."""
    text = processor.apply_chat_template([{"role": "user", "content": question.prompt}])
    pieces = IMAGE_TAG.split(text)
    ids = processor.tokenizer.encode(pieces[0])
    for number, chunk in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        ids += [-number] * len(features[question.pictures[number - 1]]) + processor.tokenizer.encode(chunk)
    return ids


def _new_tokens(
    model: Any,
    batch: dict[str, torch.Tensor],
    features: list[torch.Tensor],
    max_new_tokens: int,
    temperature: float,
    draw: torch.Generator,
) -> list[list[int]]:
    """New tokens of each row, its stop token left out."""
    input_ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    embeds = model.model.embed_tokens(input_ids.clamp(min=0))
    if features:
        embeds = model.model.vision_embed_tokens(input_ids, embeds, image_features=features)
    cache = model.new_cache(len(input_ids), input_ids.shape[1] + max_new_tokens)
    stop_ids = torch.tensor(model.config.stop_token_ids, device=model.device)
    logits = model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=model.device)
    columns = []
    for step in range(max_new_tokens):
        if temperature:
            chances = (logits[:, -1].float() / temperature).softmax(dim=-1)
            tokens = torch.multinomial(chances, 1, generator=draw)[:, 0]
        else:
            tokens = logits[:, -1].argmax(dim=-1)
        ended = ended | torch.isin(tokens, stop_ids)
        columns.append(torch.where(ended, -1, tokens))
        if bool(ended.all()) or step + 1 == max_new_tokens:
            break
        logits = model(input_ids=tokens[:, None], past_key_values=cache, logits_to_keep=1).logits
    return [[token for token in row if token >= 0] for row in torch.stack(columns, dim=1).tolist()]
