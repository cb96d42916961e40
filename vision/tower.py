"""The CLIP vision tower, on timm's VisionTransformer.

For the published sizes this is timm's ``vit_large_patch14_clip_quickgelu_336``: class token, LayerNorm before the
blocks, QuickGELU, eps 1e-5 (arXiv 2103.00020). The language model reads the hidden state of the last but one
block, so the last block and the final norm never run: they are kept as frozen parameters, that a checkpoint
round-trips, and left out of ``used`` counts.
"""

import contextlib
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phi35.config import VisionConfig
from phi35.fused import activate, uses_kernels
from phi35.norm import LayerNorm


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), as CLIP has it.

    Attributes:
        fused: take it by ``phi35.fused``. Without gradients on a GPU always: one kernel in place of three.
    """

    fused = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Any shape."""
        if self.fused or (hidden_states.is_cuda and not torch.is_grad_enabled() and uses_kernels(hidden_states)):
            return activate(hidden_states, "quick_gelu")
        return hidden_states * torch.sigmoid(1.702 * hidden_states)


class ClipVisionTower(VisionTransformer):
    """Crops to patch features.

    Parameter names are timm's (``patch_embed.proj``, ``cls_token``, ``pos_embed``, ``norm_pre``, ``blocks.N``,
    ``norm``); there are no buffers, so that a tower made on the meta device needs its parameters alone.

    Args:
        config: sizes of the tower.

    Attributes:
        unused_parameter_names: parameters that the features do not depend on.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            # timm truncates width * ratio; half a unit more keeps the rounding of the quotient from costing one
            mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,
            num_classes=0,
            pre_norm=True,
            norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
            act_layer=QuickGELU,
        )
        self._last_used_block = config.num_hidden_layers - 2
        unused = (f"blocks.{config.num_hidden_layers - 1}.", "norm.")
        self.unused_parameter_names = tuple(name for name, _ in self.named_parameters() if name.startswith(unused))
        for name in self.unused_parameter_names:
            self.get_parameter(name).requires_grad_(False)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each block is recomputed in the backward pass."""
        return self.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.set_grad_checkpointing(enabled)

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]  # patches, not a class token
        """Features of the last but one block, without the class token.

        Args:
            pixel_values: (C, 3, S, S) normalised crops, in any floating dtype (cast to the tower's).

        Returns:
            (C, n^2, width) in the tower's dtype, n patches along a side, row by row.

        Raises:
            ValueError: for another shape.
        """
        side = self.patch_embed.img_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, *side):
            raise ValueError(f"expected pixel_values (C, 3, {side[0]}, {side[1]}), got {tuple(pixel_values.shape)}")
        weight = self.patch_embed.proj.weight
        with _fast_attention(weight.is_cuda and not torch.is_grad_enabled()):
            intermediates = self.forward_intermediates(
                pixel_values.to(device=weight.device, dtype=weight.dtype),
                indices=[self._last_used_block],
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        assert isinstance(intermediates, list)
        return intermediates[0]


def _fast_attention(wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Prefer cuDNN's attention, then flash attention, where they take the inputs."""
    backends = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(backends, set_priority=True) if wanted else contextlib.nullcontext()
