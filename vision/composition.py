"""A vision model before its first step: a text model, a CLIP tower, and a projector that nobody has trained.

This is where LLaVA's recipe begins (arXiv 2304.08485, 2310.03744), and what the published Phi-3.5-vision began with:
a decoder of the family beside OpenAI's ViT-L/14-336. Only projector and separators are random.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from phi35.checkpoint.streaming import check_target
from phi35.config import VisionConfig
from phi35.loading import find_folder, load, load_config, save
from phi35.model import CausalLM
from phi35.processor import Processor
from phi35.tokenizer import Tokenizer
from vision.embedding import VisionEmbedding
from vision.open_clip_weights import import_tower
from vision.pretraining import load_tower

TowerSource = str | Path | Mapping[str, Tensor]


def compose(
    text: str | Path, tower: TowerSource, target: str | Path, vision: VisionConfig | None = None, seed: int = 0
) -> CausalLM:
    """Writes the vision model made of a text model and a tower.

    Args:
        text: folder or hub id of a text model.
        tower: "openai" (fetched by open_clip), a file with open_clip's weights, or a safetensors file with the tower's
            own names (``scripts/pretrain_tower.py``).
        target: folder to write.
        vision: sizes of the image side; None takes the published ones.
        seed: of projector and separators.

    Returns:
        The model that was written.

    Raises:
        ValueError: if the text model has an image side already or no tokenizer, the tower does not fit, or the target
            is the source.
    """
    folder, target = find_folder(text), Path(target).expanduser()
    check_target(folder, target)
    config = load_config(folder)
    if config.vision is not None:
        raise ValueError(f"{str(text)!r} has an image side already; give a text model")
    config = config.replace(model_type="phi3_v", vision=vision or VisionConfig())
    embedding = VisionEmbedding(config)
    _draw(embedding, config.initializer_range, seed)
    _fill_tower(embedding, tower)
    model, processor = load(folder, device="cpu", dtype="auto")
    if processor is None:
        raise ValueError(f"{str(text)!r} has no tokenizer: a vision model needs one for its prompts")
    model.config = model.model.config = config
    model.model.vision_embed_tokens = embedding.to(model.dtype)
    model.processor = Processor(_with_bos(processor.tokenizer), config)
    save(model, model.processor, target)
    return model


@torch.no_grad()
def _draw(embedding: VisionEmbedding, deviation: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embedding.sub_GN.normal_(0.0, deviation, generator=generator)
    embedding.glb_GN.normal_(0.0, deviation, generator=generator)
    for layer in embedding.img_projection:
        if isinstance(layer, nn.Linear):
            layer.weight.normal_(0.0, deviation, generator=generator)
            layer.bias.zero_()


def _fill_tower(embedding: VisionEmbedding, source: TowerSource) -> None:
    if not isinstance(source, Mapping) and Path(source).suffix == ".safetensors" and Path(source).is_file():
        from safetensors import safe_open

        with safe_open(str(source), framework="pt") as file:
            if "patch_embed.proj.weight" in file.keys():
                holder = nn.Module()
                holder.vision_embed_tokens = embedding
                load_tower(holder, source)
                return
    import_tower(embedding, source)


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with BOS before every piece of a prompt, as the published vision processor puts it."""
    if tokenizer.add_bos or tokenizer.bos_token_id is None:
        return tokenizer
    return tokenizer.with_settings(add_bos_token=True)
