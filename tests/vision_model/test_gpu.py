"""The image path on a GPU against the CPU."""

import pytest
import torch
from images import random_crops, randomise, small_config

from phi35.model import CausalLM
from vision.image_transform import num_image_tokens
from vision.pixels import CropMaker

CONFIG = small_config()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_and_gradients_on_the_gpu_equal_those_on_the_cpu():
    pixel_values, image_sizes = random_crops(CONFIG, [(1, 2), (2, 2), (1, 1)])
    a, b, c = (num_image_tokens(*size, CONFIG.vision) for size in image_sizes.tolist())
    rows = [[1] + [-2] * b + [7] + [-1] * a + [8], [9] * 4, [1] + [-1] * c + [4]]
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[1000] * (length - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]),
        "pixel_values": pixel_values,
        "image_sizes": image_sizes,
    }
    real = batch["attention_mask"].bool()
    results = []
    for device in ("cpu", "cuda"):
        model = CausalLM(CONFIG)
        randomise(model)
        model.to(device)
        logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
        logits.float().log_softmax(-1)[:, :, 5].cpu()[real].sum().backward()
        separators = model.model.vision_embed_tokens.sub_GN
        results.append((logits.detach().cpu()[real], separators.grad.cpu(), model.lm_head.weight.grad.cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert (on_cpu - on_gpu).abs().max() < 1e-3 * on_cpu.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_crops_made_on_the_gpu_are_those_of_the_cpu():
    crops = CropMaker(CONFIG.vision)
    side = CONFIG.vision.image_size
    sizes = [(side, side), (2 * side, side), (side, 3 * side), (2 * side, side)]
    generator = torch.Generator().manual_seed(0)
    total = sum(3 * height * width for height, width in sizes)
    pictures = torch.randint(0, 256, (total,), dtype=torch.uint8, generator=generator)
    on_cpu, on_gpu = crops(pictures, sizes), crops(pictures.cuda(), sizes).cpu()
    tiles = [0, 1, 3, 4, 6, 7, 8, 10, 11]  # all but the reduced global views
    assert torch.equal(on_cpu[tiles], on_gpu[tiles])
    assert (on_cpu - on_gpu).abs().max() < 1e-4  # bicubic sums round otherwise; values reach 2.6
