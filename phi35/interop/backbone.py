"""The decoder without its head, as trainers ask for it that score tokens by a head of their own."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from phi35.interop.inputs import packed_crops, packed_lengths, sample_ends
from phi35.model import CausalLM


class Backbone:
    """What ``base_model`` of a wrapped model is: a callable over its modules, which owns none.

    Args:
        causal_lm: the model.
    """

    def __init__(self, causal_lm: CausalLM) -> None:
        self._causal_lm = causal_lm

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **flattened: Any,
    ) -> Any:
        """One pass up to the final norm; arguments as of the wrapped model.

        Returns:
            ``last_hidden_state`` (B, T, D) and, of sparse models, ``router_logits``.

        Raises:
            ValueError: for ``use_cache=True``, and as ``CausalLM.forward``.
        """
        ends = sample_ends(flattened)
        if use_cache:
            raise ValueError("the decoder alone keeps no cache: call the model")
        if pixel_values is not None and pixel_values.dim() == 5:
            pixel_values = packed_crops(self._causal_lm, pixel_values, image_sizes)
        if ends is not None and attention_mask is not None:
            raise ValueError("samples one after another (cu_seq_lens_q) take no attention_mask")
        lengths = None if attention_mask is not None else packed_lengths(position_ids, ends)
        output = self._causal_lm(
            input_ids,
            attention_mask=attention_mask,
            position_ids=None if lengths is not None else position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            sequence_lengths=lengths,
            return_logits=False,
        )
        if not output.router_outputs:
            result: Any = BaseModelOutputWithPast(last_hidden_state=output.hidden_states)
        else:
            result = MoeModelOutputWithPast(
                last_hidden_state=output.hidden_states,
                router_logits=output.router_logits if output_router_logits else None,
            )
        return result.to_tuple() if return_dict is False else result
