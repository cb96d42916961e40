"""What transformers' own suite asks of every causal model, as far as it applies, on the three tiny models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.generation import BaseStreamer
from wrapped_models import IDS, PRESETS, picture_batch, wrapped

import phi35
from phi35.training.build import SMALL_MODEL

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer.json", "ignore::FutureWarning")
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


@pytest.fixture(params=PRESETS)
def model(request: pytest.FixtureRequest) -> Any:
    return wrapped(PRESETS[request.param])


def test_random_weights_from_a_config(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    fresh = AutoModelForCausalLM.from_config(config)
    assert type(fresh).__module__ == "phi35.interop.modeling" and len(fresh.causal_lm.model.layers) == 3
    assert fresh(IDS).logits.std() > 0.01 and fresh.generation_config.eos_token_id == [1007, 1001, 1000]
    half = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).device.type == "meta"


def test_passes_repeat_and_tuples_equal_outputs(model: Any) -> None:
    with torch.no_grad():
        first, second = model(IDS, attention_mask=MASK, labels=IDS), model(IDS, attention_mask=MASK, labels=IDS)
        as_tuple = model(IDS, attention_mask=MASK, labels=IDS, return_dict=False)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(as_tuple[0], first.loss) and any(torch.equal(one, first.logits) for one in as_tuple[1:])
    other = copy.deepcopy(model)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert other.causal_lm.lm_head.weight is not model.causal_lm.lm_head.weight


def test_embeddings_stand_in_for_ids(model: Any) -> None:
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(IDS).logits)
    options = {"attention_mask": MASK, "max_new_tokens": 5}
    alone = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(alone, model.generate(IDS, **options)[:, IDS.shape[1] :])
    with pytest.raises(ValueError, match="exactly one"):
        model(IDS, inputs_embeds=embeds)


def test_padding_on_the_left_changes_nothing(model: Any) -> None:
    padded = torch.cat((torch.full((2, 4), 1000), IDS), dim=1)
    mask = torch.cat((torch.zeros(2, 4, dtype=torch.int64), torch.ones_like(IDS)), dim=1)
    with torch.no_grad():
        got, expected = model(padded, attention_mask=mask).logits[:, 4:], model(IDS).logits
    assert (got - expected).abs().max() < 2e-5  # measured 4e-6


def test_logits_of_the_last_positions_alone(model: Any) -> None:
    with torch.no_grad():
        assert torch.allclose(model(IDS, logits_to_keep=2).logits, model(IDS).logits[:, -2:], atol=1e-5)
    with pytest.raises(ValueError, match="all positions"):
        model(IDS, labels=IDS, logits_to_keep=2)


def test_a_generations_scores_and_logits_come_back(model: Any) -> None:
    result = model.generate(
        IDS,
        attention_mask=MASK,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    new = result.sequences.shape[1] - IDS.shape[1]
    assert len(result.scores) == len(result.logits) == len(result.hidden_states) == new
    assert torch.equal(result.logits[0].argmax(dim=-1), result.sequences[:, IDS.shape[1]])
    whole = model(IDS, attention_mask=MASK).logits[:, -1]
    assert torch.allclose(result.logits[0], whole, atol=2e-5)
    cache = getattr(result, "cache", None) or result.past_key_values
    assert cache.get_seq_length() == result.sequences.shape[1] - 1
    beams = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=4, num_beams=2, return_dict_in_generate=True, output_scores=True
    )
    steps = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    assert torch.allclose(steps.sum(dim=1) / (steps < 0).sum(dim=1), beams.sequences_scores, atol=1e-4)


def test_processors_stopping_and_streams(model: Any) -> None:
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 3)

    options = {"attention_mask": MASK, "max_new_tokens": 9}
    stopped = model.generate(IDS, **options, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert stopped.shape[1] == IDS.shape[1] + 3
    first = int(stopped[0, IDS.shape[1]])
    ends = [MinNewTokensLengthLogitsProcessor(IDS.shape[1], 5, eos_token_id=[first], device="cpu")]
    later = model.generate(IDS, **options, eos_token_id=first, logits_processor=LogitsProcessorList(ends))
    assert first not in later[0, IDS.shape[1] : IDS.shape[1] + 5].tolist()
    collected: list[int] = []

    class Collected(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            collected.extend(value.flatten().tolist())

        def end(self) -> None:
            collected.append(-1)

    row = model.generate(IDS[1:], attention_mask=MASK[1:], max_new_tokens=6, streamer=Collected())
    assert collected == [*row[0].tolist(), -1]


@pytest.mark.parametrize("sampled", [False, True])
def test_an_assistant_drafts_what_the_model_says(model: Any, sampled: bool) -> None:
    ids = {"input_ids": IDS[1:], "attention_mask": torch.ones_like(IDS[1:]), "max_new_tokens": 8}
    draft = wrapped(PRESETS["phi3"])
    draft.generation_config.num_assistant_tokens = 3
    torch.manual_seed(0)
    assisted = model.generate(**ids, assistant_model=draft, do_sample=sampled)
    assert assisted.shape[1] <= IDS.shape[1] + 8
    if not sampled:
        assert torch.equal(assisted, model.generate(**ids))


@pytest.mark.parametrize("multiple", [None, 64])
def test_the_vocabulary_grows_to_a_multiple(model: Any, multiple: int | None) -> None:
    before = model.get_input_embeddings().weight.detach().clone()
    returned = model.resize_token_embeddings(1100, pad_to_multiple_of=multiple, mean_resizing=False)
    size = 1100 if multiple is None else 1152
    assert returned is model.get_input_embeddings() and returned.weight.shape == (size, 64)
    assert torch.equal(returned.weight[:1088], before) and model.config.vocab_size == size
    new = torch.full((1, 3), size - 1)
    assert model(new).logits.shape == (1, 3, size)
    model.resize_token_embeddings(1088)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_gradients_under_checkpointing_and_frozen_embeddings(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(False)
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train().zero_grad()
        torch.manual_seed(4)
        model(IDS, labels=IDS).loss.backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    assert all(torch.allclose(one, found[1][name], atol=1e-7) for name, one in found[0].items())
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_accumulated_steps_of_the_trainer_equal_a_large_one(tmp_path: Path) -> None:
    lengths = (7, 3, 5, 6)
    rows = [{"input_ids": IDS[0, :length].tolist(), "labels": IDS[0, :length].tolist()} for length in lengths]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        padded = {
            name: [row[name] + [fill] * (longest - len(row[name])) for row in batch]
            for name, fill in (("input_ids", 1000), ("labels", -100))
        }
        tensors = {name: torch.tensor(value) for name, value in padded.items()}
        return tensors | {"attention_mask": (tensors["input_ids"] != 1000).long()}

    weights = []
    for size, accumulated in ((4, 1), (1, 4)):
        model = wrapped(PRESETS["phi3"], scale=1.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.1,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
        weights.append(model.causal_lm.lm_head.weight.detach())
    assert not torch.equal(weights[0], wrapped(PRESETS["phi3"], scale=1.0).causal_lm.lm_head.weight)
    # the trainer's number counts labels at position 0, which nothing predicts: both ways divide by it alike
    assert torch.allclose(*weights, atol=1e-6)


@pytest.mark.parametrize("model_type", ["phi3", "phimoe"])
def test_a_trainer_goes_on_from_its_checkpoint(model_type: str, tmp_path: Path) -> None:
    rows = [{"input_ids": IDS[row % 2].tolist(), "labels": IDS[row % 2].tolist()} for row in range(6)]
    options = {"use_cpu": True, "save_steps": 2, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, **options)
    whole = wrapped(PRESETS[model_type], scale=1.0)
    Trainer(whole, arguments, train_dataset=rows).train()
    other = wrapped(PRESETS[model_type], scale=1.0, seed=8)
    Trainer(other, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_pipelines_answer_as_we_do() -> None:
    model, processor = AutoModelForCausalLM.from_pretrained(SMALL_MODEL), AutoProcessor.from_pretrained(SMALL_MODEL)
    ours, _ = phi35.load(SMALL_MODEL, device="cpu")
    picture = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": "What is it?"}],
        }
    ]
    answer = pipeline("image-text-to-text", model=model, processor=processor)(
        chat, generate_kwargs={"max_new_tokens": 8}
    )
    expected = phi35.generate(prompt="What is it?", images=[picture], model=ours, max_new_tokens=8, temperature=0.0)
    assert answer[0]["generated_text"][-1]["content"].strip() == expected.strip()
    texts = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    assert texts("red", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("red")


def test_a_few_steps_overfit_a_batch_of_pictures() -> None:
    model, batch = wrapped(PRESETS["phi3_v"], scale=1.0).train(), picture_batch()
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 1044), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
