"""The two stages of recipes/: a composed model, projector first, then everything from what stage 1 exported."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from PIL import Image

import phi35
from phi35 import presets
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer
from phi35.training.config import read_config
from phi35.training.parameter_groups import part_of
from vision.composition import compose
from vision.pretraining import save_tower
from vision.shard_writer import ShardWriter
from vision.tower import ClipVisionTower

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vision_stage1_projector", "vision_stage2_full")
TINY = presets.get("tiny-phi-3.5-vision").vision


def test_the_ready_files_are_the_published_recipe() -> None:
    first, second = (read_config(ROOT / f"recipes/{name}.yaml") for name in STAGES)
    assert (first.learning_rate, second.learning_rate) == (1e-3, 2e-5)
    assert (first.global_batch_size, second.global_batch_size) == (256, 128)
    assert set(first.freeze) == {"tower", "decoder", "embeddings"} and not second.freeze
    assert second.learning_rate / second.learning_rates["tower"] == pytest.approx(10)
    assert second.model == f"{first.output_dir}/model" and first.export
    for config in (first, second):
        assert config.warmup_steps == pytest.approx(0.03 * config.max_steps, abs=1)
        for world_size in (1, 2, 8):
            config.resolve(world_size=world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model, a tower, the model composed of both, and shards."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = Tokenizer.from_folder(Path(presets.__file__).parent / "small_model")
    text = phi35.create("tiny-phi-3.5-mini", device="cpu", dtype="float32", seed=1)
    phi35.save(text, Processor(tokenizer, text.config), folder / "text")
    torch.manual_seed(5)
    assert TINY is not None
    save_tower(ClipVisionTower(TINY), folder / "tower.safetensors", {})
    compose(folder / "text", folder / "tower.safetensors", folder / "untrained", TINY)
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards") as writer:
        for number in range(12):
            colour = ("red", "green", "blue")[number % 3]
            pixels = rng.integers(0, 90, (50, 40, 3), dtype=np.uint8)
            pixels[:, :, number % 3] += 150
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            turns = [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": colour}]
            writer.write(f"s{number}", {"messages": turns}, [("png", buffer.getvalue())])
    return folder


def test_a_composed_model_reads_text_as_before_and_sees_with_the_tower(folder: Path) -> None:
    text, _ = phi35.load(folder / "text", device="cpu", dtype="float32")
    model, processor = phi35.load(folder / "untrained", device="cpu", dtype="float32")
    ids = torch.randint(3, 900, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, text(input_ids=ids).logits)
    tower = model.model.vision_embed_tokens.img_processor.state_dict()
    from safetensors.torch import load_file

    assert all(torch.equal(value, tower[name]) for name, value in load_file(folder / "tower.safetensors").items())
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    batch = processor("<|user|>\n<|image_1|>\nwhat?<|end|>\n<|assistant|>\n", images=[picture])
    bos = processor.tokenizer.bos_token_id
    assert batch["input_ids"][0, 0] == bos  # before every piece, as the published vision processor
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match="image side already"):
        compose(folder / "untrained", folder / "tower.safetensors", folder / "again", TINY)
    with pytest.raises(ValueError, match="does not fit"):
        compose(folder / "text", folder / "tower.safetensors", folder / "again")
    assert not (folder / "again").exists()


def run_stage(rank: int, world_size: int, folder: str, stage: int) -> list[float]:
    from phi35.training.run import train

    tiny = {
        "model": "untrained" if stage == 0 else "stage-0/model",
        "data": "shards",
        "output_dir": f"stage-{stage}",
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 4,
        "warmup_steps": 1,
        "save_interval": 0,
        "num_workers": 0,
        "log_interval": 1,
    }
    for name in ("model", "data", "output_dir"):
        tiny[name] = str(Path(folder) / str(tiny[name]))
    overrides = [f"{name}={value}" for name, value in tiny.items()]
    summary = train(read_config(ROOT / f"recipes/{STAGES[stage]}.yaml", overrides), device="cpu")
    return [] if summary is None else [line["loss"] for line in summary.history]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return phi35.load(folder, device="cpu", dtype="float32")[0].state_dict()


def changes(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest change of a weight in each part."""
    largest: dict[str, float] = {}
    for name, value in before.items():
        change = (after[name] - value).abs().max().item()
        largest[part_of(name)] = max(largest.get(part_of(name), 0.0), change)
    return largest


def test_projector_first_then_everything_from_there(folder: Path) -> None:
    losses = [run_distributed(run_stage, 2, str(folder), stage)[0] for stage in (0, 1)]
    stored = {name: value.bfloat16().float() for name, value in weights(folder / "untrained").items()}
    first = changes(stored, weights(folder / "stage-0/model"))  # what is frozen is held in the run's bfloat16
    second = changes(weights(folder / "stage-0/model"), weights(folder / "stage-1/model"))
    assert first["projector"] > 1e-3
    assert first["tower"] == first["decoder"] == first["embeddings"] == 0.0
    assert all(second[part] > 0 for part in ("tower", "projector", "decoder", "embeddings")), second
    assert second["decoder"] < 4 * 2.1e-5  # four updates of Adam at 2e-5, in bfloat16 with float32 masters
    assert all(np.isfinite(losses[0] + losses[1]))
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=0.05)  # stage 2 goes on where stage 1 stopped
