"""What the planner counts on the meta device against what a real pass on the CPU keeps alive."""

import gc

import pytest
import torch

import phi35
from phi35 import presets
from phi35.planning.activations import PassSettings, count_activations
from phi35.planning.live_memory import LiveMemory
from phi35.training.acceleration import fuse
from phi35.training.loss import auxiliary_losses

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 16}


def alive_after(run):
    """Bytes of the tensors that a call made and that live while its result is held."""
    gc.collect()
    live = LiveMemory()
    with live:
        result = run()
        gc.collect()
        made = live.now
    assert result is not None
    return made


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("checkpointing", [False, "selective", True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers(dtype, checkpointing, fused):
    config = presets.get("tiny-phi-3.5-mini").replace(**WIDE)
    settings = PassSettings(batch_size=2, length=24, dtype=dtype, fused=fused, gradient_checkpointing=checkpointing)
    planned = count_activations(config, settings)
    model = phi35.create("tiny-phi-3.5-mini", device="cpu", dtype=dtype, **WIDE).train()
    model.gradient_checkpointing = checkpointing
    fuse(model, fused)
    embeds = torch.randn(2, 24, 128, dtype=dtype, requires_grad=True)
    used = [parameter for name, parameter in model.named_parameters() if "layers" in name or "model.norm" in name]
    weights = sum(parameter.untyped_storage().nbytes() for parameter in used)
    kept = alive_after(lambda: model.model(None, inputs_embeds=embeds)) - weights
    if fused:
        # Tables of the rotary embedding (kept by the model, 160 bytes) come into being in the first pass.
        assert 0 <= kept - planned.decoder <= 400
    else:
        # torch's RMSNorm is one operation on a GPU alone; on a CPU it keeps float32 intermediate values too.
        assert planned.decoder <= kept


@pytest.mark.parametrize("router_type", ["sparsemixer", "topk"])
def test_sparse_layers_with_torchs_grouped_product(router_type, monkeypatch):
    changes = {**WIDE, "router_type": router_type}
    config, settings = presets.get("tiny-phi-3.5-moe").replace(**changes), PassSettings(batch_size=2, length=24)
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)  # the planner then takes grouped_mm
        planned = (
            count_activations.__wrapped__(config, settings)
            if hasattr(count_activations, "__wrapped__")
            else (count_activations(config, settings))
        )
    model = phi35.create("tiny-phi-3.5-moe", device="cpu", dtype="bfloat16", experts_backend="grouped_mm", **changes)
    fuse(model.train())
    embeds = torch.randn(2, 24, 128, dtype=torch.bfloat16, requires_grad=True)
    used = [parameter for name, parameter in model.named_parameters() if "layers" in name or "model.norm" in name]
    weights = sum(parameter.untyped_storage().nbytes() for parameter in used)
    kept = alive_after(lambda: model.model(None, inputs_embeds=embeds)) - weights
    # On a CPU the router keeps float32 copies of its tokens, in place of the bfloat16 ones, and of its weight.
    copies = 3 * (2 * 2 * 24 * 128 + 4 * 4 * 128)
    assert kept - copies == pytest.approx(planned.decoder, abs=400)


def test_image_tower_and_projector():
    config = presets.get("tiny-phi-3.5-vision")
    planned = count_activations(config, PassSettings(batch_size=1, length=16, crops=3, dtype=torch.float32))
    model = phi35.create("tiny-phi-3.5-vision", device="cpu", dtype="float32").train()
    fuse(model)
    side = config.vision.image_size
    pixels = torch.randn(3, 3, side, side)
    embedding = model.model.vision_embed_tokens
    unused = set(embedding.unused_parameter_names)
    used = [parameter for name, parameter in embedding.named_parameters() if name not in unused]
    weights = sum(parameter.untyped_storage().nbytes() for parameter in used)
    kept = alive_after(lambda: embedding.features(pixels, [[side, 2 * side]])) - weights
    assert kept == pytest.approx(planned.tower, rel=0.02)


def test_layers_add_up_and_recomputation_leaves_their_inputs():
    counts = {}
    for layers in (2, 4, 6):
        config = presets.get("tiny-phi-3.5-mini").replace(**{**WIDE, "num_hidden_layers": layers})
        for checkpointing in (False, "selective", True):
            settings = PassSettings(batch_size=1, length=64, gradient_checkpointing=checkpointing)
            counts[layers, checkpointing] = count_activations(config, settings)
    tokens, width, ffn = 64, 128, 256
    layer = counts[4, False].decoder - counts[2, False].decoder
    assert layer == counts[6, False].decoder - counts[4, False].decoder
    heads = 4 * 16 * 3
    # bfloat16: the stream twice, two normalised copies, queries keys and values, attention, gate and up, their product;
    # float32: two deviations and a number for each head.
    assert layer == 2 * tokens * (2 * (4 * width + heads + 4 * 16 + 3 * ffn) + 4 * (2 + 4))
    lean = counts[4, "selective"].decoder - counts[2, "selective"].decoder
    assert layer - lean == 2 * tokens * 2 * (2 * width + ffn)
    assert counts[4, True].decoder - counts[2, True].decoder == 2 * tokens * 2 * width
    # While a layer is recomputed, all of it but the stream's last sum and the next layer's input comes back.
    assert 0 < counts[4, True].layer <= layer // 2 + 2 * tokens * 2 * width


def test_router_losses_keep_little_beside_the_layers():
    config = presets.get("tiny-phi-3.5-moe").replace(**WIDE)
    model = phi35.create("tiny-phi-3.5-moe", device="cpu", dtype="float32", **WIDE).train()
    output = model(input_ids=torch.zeros(2, 24, dtype=torch.int64))
    made = alive_after(lambda: auxiliary_losses(output, None, balance=0.1, z=0.1))
    assert made < 0.2 * count_activations(config, PassSettings(batch_size=2, length=24, dtype=torch.float32)).decoder
