"""What ``generate`` of transformers needs to know of these models: their cache, and whose pictures are whose."""

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from phi35.interop.cache import RowCache

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in this transformers: newer ones renamed ``past_key_values``."""


class Generation:
    """Generation with ``RowCache``; every row gets what it would get alone."""

    causal_lm: Any

    def generate(self, inputs: torch.Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        """As ``generate`` of transformers, in evaluation mode whatever mode the model is in.

        A model in training mode would sample its experts and drop activations; the mode comes back afterwards.

        Raises:
            ValueError: as transformers, and for a cache of another kind.
        """
        module: Any = self
        parent: Any = super()
        training = module.training
        module.eval()
        try:
            return parent.generate(inputs, *arguments, **options)
        finally:
            module.train(training)

    def new_cache(self) -> RowCache:
        """An empty cache to hand to ``forward`` or ``generate``."""
        return RowCache(self.causal_lm)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> None:
        kind, given = generation_config.cache_implementation, model_kwargs.get(CACHE_NAME)
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {kind!r} is not supported for the models of phi35: leave it out, which takes "
                "their own growing cache (model.causal_lm.generate has preallocated ones and CUDA graphs)"
            )
        if given is not None:
            check_cache(given)
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = self.new_cache()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        parent: Any = super()
        pixels, sizes = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_sizes", None)
        images = {} if pixels is None else {"pixel_values": pixels, "image_sizes": sizes}
        if expand_size > 1 and pixels is not None:
            if input_ids is None or sizes is None:
                raise ValueError("several continuations of prompts with pictures need input_ids and image_sizes")
            repeated = self._repeated_images(input_ids, pixels, sizes, expand_size)
            images = dict(zip(images, repeated, strict=True))
        input_ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _repeated_images(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_sizes: torch.Tensor, times: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's pictures, as often as the row is repeated."""
        owned = self.causal_lm.model.vision_embed_tokens.images_of_rows(input_ids, image_sizes)
        order = [image for images in owned for _ in range(times) for image in images]
        if pixel_values.dim() == 5:  # one entry an image
            return pixel_values[order], image_sizes[order]
        counts = self.causal_lm.model.vision_embed_tokens.crops_of_images(image_sizes)
        crops = pixel_values.split(counts)
        return torch.cat([crops[image] for image in order]), image_sizes[order]


def check_cache(given: Any) -> None:
    """Check that a cache is one of these models.

    Raises:
        ValueError: if it is another.
    """
    if not isinstance(given, RowCache):
        raise ValueError(
            f"the models of phi35 take the cache that model.new_cache() makes, got {type(given).__name__}: its rows "
            "are stored without padding and know their LongRoPE factors"
        )
