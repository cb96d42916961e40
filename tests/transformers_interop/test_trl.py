"""TRL's trainers on the three tiny models: text, sparse with its balancing loss, vision with several pictures a row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from wrapped_models import IDS, PRESETS

import phi35
from phi35.adapters.layers import register
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer
from phi35.training.build import SMALL_MODEL

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", params=PRESETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    model = phi35.create(PRESETS[request.param], seed=1)
    tokenizer = Tokenizer.from_folder(SMALL_MODEL)
    if model.config.vision is None:
        tokenizer = tokenizer.with_settings(add_bos_token=False)
    phi35.save(model, Processor(tokenizer, model.config), path)
    return path


def rows(folder: Path, **turns: str) -> Dataset:
    """Eight chats; for a vision model with no, one or two pictures of several sizes each."""
    draw = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for number in range(8):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"Say {number % 3}"}]}
        row |= {name: [{"role": "assistant", "content": text}] for name, text in turns.items()}
        if (folder / "preprocessor_config.json").exists():
            shapes = [(64, 64, 3), (50, 130, 3)][: number % 3]
            row["images"] = [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
        found.append(row)
    return Dataset.from_list(found)


def options(folder: Path, output: Path, steps: int, **others: Any) -> dict[str, Any]:
    """Settings that all trainers share."""
    sparse = {"router_aux_loss_coef": 0.1} if "phimoe" in folder.name else {}
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **sparse,
        **others,
    }


def logged(trainer: Any, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def test_supervised_training_lowers_the_loss_and_saves_a_model(folder: Path, tmp_path: Path) -> None:
    config = SFTConfig(**options(folder, tmp_path, 8), max_length=None)
    trainer = SFTTrainer(str(folder), args=config, train_dataset=rows(folder, completion="one two three"))
    assert type(trainer.model).__module__ == "phi35.interop.modeling"
    trainer.train()
    losses = logged(trainer, "loss")
    assert np.mean(losses[-2:]) < 0.6 * losses[0]
    assert bool(logged(trainer, "aux_loss")) == ("phimoe" in folder.name)
    trainer.save_model(str(tmp_path / "saved"))
    again, processor = phi35.load(tmp_path / "saved", device="cpu")
    assert processor is not None and processor.tokenizer.encode("a") == Tokenizer.from_folder(folder).encode("a")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, trainer.model.eval()(IDS).logits)


def test_preference_training_widens_the_margin(folder: Path, tmp_path: Path) -> None:
    config = DPOConfig(**options(folder, tmp_path, 6), max_length=None)
    dataset = rows(folder, chosen="one two three", rejected="no")
    trainer = DPOTrainer(str(folder), args=config, train_dataset=dataset)
    assert type(trainer.ref_model).__module__ == "phi35.interop.modeling"
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    # a sparse model samples its experts in training: the first margin is not exactly 0
    assert abs(margins[0]) < 0.05 and np.mean(margins[-2:]) > 0.5
    assert bool(logged(trainer, "aux_loss")) == ("phimoe" in folder.name)


def test_policy_training_raises_the_reward(folder: Path, tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(np.mean([token % 2 for token in ids])) for ids in completion_ids]

    settings = options(folder, tmp_path, 8, per_device_train_batch_size=8, learning_rate=1e-2)
    config = GRPOConfig(**settings, num_generations=4, max_completion_length=4, beta=0.01, top_k=8)
    trainer = GRPOTrainer(str(folder), reward, args=config, train_dataset=rows(folder))
    trainer.train()
    rewards = logged(trainer, "reward")
    # measured: 0.69 to 0.93 (text), 0.42 to 0.97 (sparse), 0.48 to 0.98 (vision)
    assert np.mean(rewards[-3:]) > max(0.8, np.mean(rewards[:2]) + 0.1)
    assert logged(trainer, "kl")[-1] > 0
    assert bool(logged(trainer, "aux_loss")) == ("phimoe" in folder.name)


def test_adapters_are_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "phimoe" in folder.name else None
    lora = register(LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"], target_parameters=experts))
    config = DPOConfig(**options(folder, tmp_path, 5), max_length=None)
    dataset = rows(folder, chosen="one two three", rejected="no")
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = DPOTrainer(model, args=config, train_dataset=dataset, peft_config=lora)
    before = {name: one.clone() for name, one in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    assert logged(trainer, "rewards/margins")[-1] > 0.02
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], one) for name, one in before.items())
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_packed_rows_train_as_rows_of_their_own(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    path = tmp_path_factory.mktemp("phi3-packed")
    model = phi35.create(PRESETS["phi3"], seed=1)
    phi35.save(model, Processor(Tokenizer.from_folder(SMALL_MODEL), model.config), path)
    losses = []
    for packing in (False, True):
        settings = options(path, tmp_path, 1, per_device_train_batch_size=1 if packing else 8)
        config = SFTConfig(**settings, packing=packing, max_length=256)
        trainer = SFTTrainer(str(path), args=config, train_dataset=rows(path, completion="one two three"))
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # the log rounds to 4 digits
