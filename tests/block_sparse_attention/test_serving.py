"""phi-3-small in the batcher and in steps over a cache: what the plain loop writes, token by token."""

import copy

import pytest
import torch
from phi_3_small_twins import real, sample, small_model

from phi35.generation.batcher import Batcher
from phi35.generation.fast_prefill import Prompt, prefill
from phi35.generation.fast_step import DecodeStep

LENGTHS = (30, 70, 130)


@pytest.mark.parametrize("chunk_size", [None, 50, 64])
def test_prompts_and_steps_over_a_cache_are_the_models_own_pass(chunk_size):
    model = copy.deepcopy(small_model()).float()
    texts = [sample(length, seed=length) for length in LENGTHS]
    cache = model.new_cache(3, 200)
    prompts = [Prompt(list(text), None, place, False) for place, text in enumerate(texts)]
    logits = prefill(model, cache, prompts, chunk_size=chunk_size, plain=True)
    cache.lengths.copy_(torch.tensor(LENGTHS))
    step = DecodeStep(model, cache, plain=True)
    for added in range(3):
        with torch.no_grad():
            for place, text in enumerate(texts):
                wanted = model(torch.tensor([text])).logits[0, -1]
                # 5e-7 measured at a deviation of 0.11.
                torch.testing.assert_close(real(logits[place]), real(wanted).float(), atol=5e-6, rtol=0)
        tokens = torch.tensor([7 + added, 8, 9])
        texts = [(*text, int(token)) for text, token in zip(texts, tokens, strict=True)]
        step.state.tokens.copy_(tokens)
        step.run()
        logits = step.logits


def test_the_batcher_writes_what_the_loop_writes():
    model = copy.deepcopy(small_model()).float()
    texts = [list(sample(length, seed=length)) for length in LENGTHS]
    batcher = Batcher(model, max_rows=2, mode="plain", chunk_size=48)
    numbers = [batcher.submit(torch.tensor(text), max_new_tokens=8, stop_token_ids=()) for text in texts]
    written = {number: [] for number in numbers}
    for emitted in batcher.run():
        written[emitted.request].append(emitted.token_id)
    for number, text in zip(numbers, texts, strict=True):
        expected = model.generate(torch.tensor([text]), max_new_tokens=8, stop_token_ids=())
        assert written[number] == expected[0, len(text) :].tolist()
