"""Learning from pairs: the loss against a naive computation, and runs of one and two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapted_models import draw_second_factors
from distributed import run_distributed
from preference_data import write_pairs
from torch.nn import functional as F
from training_runs import settings, tensors_of, text_files, train_and_read

import phi35
from phi35.adapters.config import AdapterConfig
from phi35.adapters.inject import add_adapter
from phi35.data.documents import open_documents
from phi35.data.preferences import PairRows, PreferencePairs
from phi35.processor import Processor
from phi35.training.build import SMALL_MODEL
from phi35.training.config import TrainingConfig
from phi35.training.preference import PreferenceObjective
from phi35.training.preference_config import PreferenceConfig
from phi35.training.run import train

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("tiny-phi-3.5-mini", "tiny-phi-3.5-moe", "tiny-phi-3.5-vision")
STILL = {"router_type": "topk", "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


def naive_log_prob(model, processor, record, side):
    """Sum over the reply's tokens, and their number, of one sample by itself, from whole logits in float64."""
    prompt = [*record["messages"]]
    images = [str(record["folder"] / name) for name in record.get("images", [])]
    if images:
        first = next(turn for turn in prompt if turn["role"] == "user")
        tags = "".join(f"<|image_{one + 1}|>\n" for one in range(len(images)))
        prompt[prompt.index(first)] = {"role": "user", "content": tags + first["content"]}
    opened = processor.apply_chat_template(prompt, add_generation_prompt=True)
    given = {"images": [images]} if images else {}
    context = processor([opened], **given)["input_ids"].shape[1]
    whole = processor([opened + record[side] + "<|end|>\n<|endoftext|>"], **given)
    stop = context + whole["input_ids"][0, context:].tolist().index(1007) + 1
    logits = model(**whole).logits.double().log_softmax(dim=-1)[0]
    ids = whole["input_ids"][0]
    return sum(logits[place - 1, ids[place]] for place in range(context, stop)), stop - context


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_single_samples(name, tmp_path):
    """Packed rows of pairs, whose reference is the adapted model itself, against sample by sample and two models."""
    path = Path(write_pairs(tmp_path, pictures="vision" in name, count=5))
    model, reference = phi35.create(name, seed=0), phi35.create(name, seed=0)
    add_adapter(model, AdapterConfig(rank=4, alpha=8), seed=1)
    draw_second_factors(model)
    processor = Processor.from_folder(SMALL_MODEL, model.config)
    pairs = PreferencePairs(open_documents(path), processor)
    pairs.restrict(pairs.measure())
    assert len(pairs) == 5 and not pairs.skipped
    batch = PairRows(pairs, 640, model.config.pad_token_id).batch([[3, 0, 1], [4, 2]])
    records = [{**json.loads(line), "folder": tmp_path} for line in path.read_text().splitlines()]
    policy, base = {}, {}
    for number, record in enumerate(records):
        for side in ("chosen", "rejected"):
            policy[number, side] = naive_log_prob(model, processor, record, side)
            with torch.no_grad():
                base[number, side] = naive_log_prob(reference, processor, record, side)[0]
    for loss, beta, smooth, source in (
        ("sigmoid", 0.1, 0.0, "adapter"),
        ("sigmoid", 0.5, 0.2, "adapter"),
        ("sigmoid", 0.3, 0.0, "none"),
        ("ipo", 0.2, 0.0, "adapter"),
    ):
        objective = PreferenceObjective(PreferenceConfig(loss=loss, beta=beta, label_smoothing=smooth), source)
        model.train()
        prepared = objective.prepare(model, batch)
        objective.start(model)
        value, shown = objective.loss(model(**objective.inputs(prepared)), prepared)
        expected = []
        for number in range(5):
            ratios = []
            for side in ("chosen", "rejected"):
                total, count = policy[number, side]
                ratio = total - (base[number, side] if source == "adapter" else 0.0)
                ratios.append(ratio / count if loss == "ipo" else ratio)
            gap = ratios[0] - ratios[1]
            if loss == "ipo":
                expected.append((gap - 1 / (2 * beta)) ** 2)
            else:
                expected.append(-(1 - smooth) * F.logsigmoid(beta * gap) - smooth * F.logsigmoid(-beta * gap))
        naive = torch.stack(expected).mean()
        assert objective.count(batch) == 5
        assert abs(float(value) - float(naive)) <= 1e-6 * max(1.0, float(naive)), (loss, float(value), float(naive))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        got = torch.autograd.grad(value, trained)
        want = torch.autograd.grad(naive, trained, retain_graph=True)
        largest = max(float(one.abs().max()) for one in want)
        for one, other in zip(got, want, strict=True):
            assert (one - other).abs().max() <= 2e-5 * largest
        assert 0 <= float(shown["reward_accuracy"]) <= 1


def test_each_tokens_loss_and_its_gradient():
    model = phi35.create("tiny-phi-3.5-mini", seed=0).train()
    ids = torch.randint(0, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    upstream = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    grads = []
    for whole in (False, True):  # chunks without logits, and whole logits
        losses = model(ids, labels=labels, loss_per_token=True, return_logits=whole).loss
        assert losses.shape == (2, 9) and not losses[:, -1].any() and not losses[0, :3].any()
        grads.append(torch.autograd.grad((losses * upstream).sum(), list(model.parameters())))
        mean = model(ids, labels=labels, return_logits=whole).loss
        torch.testing.assert_close(losses.sum() / (labels[:, 1:] >= 0).sum(), mean, atol=1e-6, rtol=0)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def run_settings(path, output, name, **changes):
    """A short run on pairs; its checkpoints after three and six steps."""
    base = {"preference": {"beta": 0.5}, "sequence_length": 448, "micro_batch_size": 1, "learning_rate": 5e-3}
    if "moe" in name:
        base |= {"model_overrides": STILL, "router_aux_loss_coef": 0.01}
    return settings(path, output, **{"model": name, **base, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-phi-3.5-mini", {"preference": {"beta": 0.5, "reference": "precomputed"}}),
        ("tiny-phi-3.5-moe", {"adapter": {"rank": 4}}),
        ("tiny-phi-3.5-vision", {"adapter": {"rank": 4}, "preference": {"loss": "ipo", "reference": "precomputed"}}),
    ],
)
def test_two_processes_make_the_steps_of_one_and_go_on_to_the_bit(name, changes, tmp_path):
    path = write_pairs(tmp_path / "data", pictures="vision" in name)
    one, two = (run_settings(path, tmp_path / run, name, **changes) for run in ("one", "two"))
    two["zero_stage"] = 2
    (expected,), (got, _) = run_distributed(train_and_read, 1, one), run_distributed(train_and_read, 2, two)
    assert expected.keys() == got.keys()
    for step in expected:
        assert abs(float.fromhex(expected[step]) - float.fromhex(got[step])) < 2e-5, step
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["reward_accuracy"] > 0.9
    assert ("balance_loss" in lines[0]) == ("moe" in name)
    if changes.get("preference", {}).get("loss", "sigmoid") == "sigmoid":
        assert abs(lines[0]["loss"] - 0.6931472) < 1e-6  # the reference is the policy before the first step
    parted = tmp_path / "parted"
    (parted / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "one" / "checkpoints" / "step-00000003", parted / "checkpoints" / "step-00000003")
    if (tmp_path / "one" / "reference_log_probs.safetensors").is_file():
        with pytest.raises(ValueError, match="weights have moved"):
            train(TrainingConfig(**{**one, "output_dir": str(parted)}), device="cpu")
        shutil.copy(tmp_path / "one" / "reference_log_probs.safetensors", parted)
    resumed = train(TrainingConfig(**{**one, "output_dir": str(parted)}), device="cpu")
    assert resumed is not None
    assert {line["step"]: line["loss"].hex() for line in resumed.history if line["step"] > 3} == {
        step: loss for step, loss in expected.items() if step > 3
    }
    first, second = (tensors_of(tmp_path / run / "checkpoints" / "step-00000006") for run in ("one", "parted"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_held_out_pairs_are_evaluated(tmp_path):
    path = write_pairs(tmp_path / "data", count=24)
    values = run_settings(path, tmp_path / "run", "tiny-phi-3.5-mini", eval_interval=3, held_out=0.3, eval_samples=4)
    summary = train(TrainingConfig(**values), device="cpu")
    assert summary is not None
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and lines[-1]["loss"] < 0.6931


def test_records_that_cannot_be_used_are_counted(tmp_path):
    good = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
    whole = [{"role": "user", "content": "Hi"}]
    records = [
        good,
        {
            "chosen": [*whole, {"role": "assistant", "content": "a"}],
            "rejected": [*whole, {"role": "assistant", "content": "b"}],
        },
        {"prompt": "Hi", "chosen": "same", "rejected": "same"},
        {"prompt": "Hi", "chosen": "Hello!"},
        {"prompt": "Hi", "chosen": "Hello <|end|> there", "rejected": "no"},
        {**good, "images": ["missing.png"]},
        {"chosen": "no prompt", "rejected": "at all"},
        {"prompt": "Hi", "chosen": " ", "rejected": "no"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)) + "\nnot json\n")
    processor = Processor.from_folder(SMALL_MODEL, phi35.create("tiny-phi-3.5-vision", device="meta").config)
    pairs = PreferencePairs(open_documents(tmp_path), processor)
    pairs.restrict(pairs.measure())
    assert len(pairs) == 2
    expected = {
        "equal_replies": 1,
        "bad_messages": 2,
        "control_token": 1,
        "bad_images": 1,
        "no_reply": 1,
        "broken_json": 1,
    }
    assert pairs.skipped == expected
    with pytest.raises(ValueError, match="no pair that fits sequence_length 8"):
        values = run_settings(str(tmp_path), tmp_path / "run", "tiny-phi-3.5-mini", sequence_length=8)
        train(TrainingConfig(**values), device="cpu")
    with pytest.raises(ValueError, match="unknown keys.*gamma"):
        TrainingConfig(preference={"gamma": 1})
    with pytest.raises(ValueError, match="loss must be.*beta must be"):
        TrainingConfig(preference={"loss": "hinge", "beta": 0})
    with pytest.raises(ValueError, match="needs an adapter"):
        TrainingConfig(preference={"reference": "adapter"})


@pytest.mark.long
def test_the_launcher_runs_both_scripts_on_two_processes(tmp_path):
    """SFT of an adapter, merged; then DPO of what came out."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    data, pairs = text_files(tmp_path), write_pairs(tmp_path / "data")
    common = ["max_steps=4", "warmup_steps=1", "global_batch_size=4", "trackers=[]"]
    first = [f"data={data}", "sequence_length=32", "export_merged=true", f"output_dir={tmp_path / 'sft'}", *common]
    second = [f"model={tmp_path / 'sft' / 'model'}", f"data={pairs}", f"output_dir={tmp_path / 'dpo'}", *common]
    for script, arguments in (("finetune.py", first), ("align.py", second)):
        command = ["deepspeed", "--num_gpus", "2", str(ROOT / "scripts" / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=560)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "training config (2 x cpu" in done.stdout
    for written in (
        "sft/adapter/adapter_model.safetensors",
        "sft/model/model.safetensors",
        "dpo/adapter/adapter_config.json",
    ):
        assert (tmp_path / written).is_file()
    line = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(line["loss"] - 0.6931472) < 1e-6 and "balance_loss" not in line
