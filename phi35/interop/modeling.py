"""Classes of transformers around ``CausalLM``: the same modules, weights read and written by this package."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from phi35.config_io import ARCHITECTURES, to_generation_dict
from phi35.interop.backbone import Backbone
from phi35.interop.configuration import WrappedConfig, config_class
from phi35.interop.generation import Generation, check_cache
from phi35.interop.inputs import packed_crops, packed_lengths, sample_ends
from phi35.interop.placement import NO_SPLIT
from phi35.interop.pretrained import Folders, refuse
from phi35.interop.results import layer_states, model_output
from phi35.language_model_head import LanguageModelHead, loss_from_logits, shift_labels
from phi35.loading import create
from phi35.model import CausalLM
from phi35.outputs import CausalLMOutput
from phi35.packed_attention import ignore_first_tokens
from phi35.registry import resolve
from phi35.token_embedding import with_factor_of


class WrappedCausalLM(Folders, Generation, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A ``CausalLM`` as a model of transformers.

    Attributes:
        causal_lm: the model itself, as ``phi35.load`` gives it.
    """

    config_class: Any = WrappedConfig
    base_model_prefix = "causal_lm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _no_split_modules = list(NO_SPLIT)
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def __init__(self, config: WrappedConfig, causal_lm: CausalLM | None = None) -> None:
        super().__init__(config)
        if causal_lm is None:  # transformers says by torch's defaults where and in what dtype
            causal_lm = create(config.current(), device=torch.get_default_device(), dtype=torch.get_default_dtype())
        self.causal_lm = causal_lm
        config.hold(self.causal_lm.config)
        self.config.dtype = self.causal_lm.dtype
        self._name_tied_weights()
        self.generation_config = GenerationConfig(**to_generation_dict(self.causal_lm.config), **self._unwritten())

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Any = None,
        **flattened: Any,
    ) -> Any:
        """One pass; arguments as of ``CausalLM.forward`` save the following.

        Args:
            position_ids: (B, T); without mask and cache they may start from 0 several times in a row of samples one
                after another: then each sample attends to itself alone.
            past_key_values: what ``new_cache`` makes; ``cache`` is its newer name.
            use_cache: None makes a cache where the config says so, no labels are given and no gradient is recorded.
            pixel_values: (C, 3, S, S) crops of all images, or (N, most crops, 3, S, S) as ``AutoProcessor`` gives them.
            output_router_logits: of sparse models: return the router's scores and the balancing loss, and add that,
                times ``router_aux_loss_coef``, to the loss. None takes the config's.
            num_items_in_batch: labels of all micro-batches of a step: the loss is a sum divided by it, and the
                balancing loss counts by this batch's share of them.
            **flattened: ``cu_seq_lens_q`` (S + 1,), where the samples of the only row begin and end, in place of such
                positions; the other arguments of flattening collators say the same once more.

        Returns:
            transformers' output of a (sparse) causal model, as a tuple with ``return_dict=False``.

        Raises:
            ValueError: for what is not supported, and as ``CausalLM.forward``.
        """
        ends = sample_ends(flattened)
        refuse({"output_attentions": output_attentions}, "forward")
        if not isinstance(logits_to_keep, int):
            raise ValueError("logits_to_keep must be a whole number: the last n positions, or 0 for all")
        if labels is not None and logits_to_keep:
            raise ValueError("labels need the logits of all positions: leave out logits_to_keep")
        cache = past_key_values if cache is None else cache
        if cache is not None:
            check_cache(cache)
        elif self._makes_cache(use_cache, labels):
            cache = self.new_cache()
        if pixel_values is not None and pixel_values.dim() == 5:
            pixel_values = packed_crops(self.causal_lm, pixel_values, image_sizes)
        lengths = None
        if cache is None and attention_mask is None:
            lengths = packed_lengths(position_ids, ends)
        elif ends is not None:
            raise ValueError("samples one after another (cu_seq_lens_q) take neither attention_mask nor a cache")
        targets = None
        if labels is not None:
            targets = shift_labels(labels if lengths is None else ignore_first_tokens(labels, lengths))
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with layer_states(self.causal_lm, bool(wants_states)) as states:
            output = self._run(
                cache,
                {
                    "input_ids": input_ids,
                    "inputs_embeds": inputs_embeds,
                    "attention_mask": attention_mask,
                    "position_ids": None if lengths is not None else position_ids,
                    "logits_to_keep": logits_to_keep,
                },
                {"pixel_values": pixel_values, "image_sizes": image_sizes, "sequence_lengths": lengths},
                targets,
            )
        if wants_states and len(states) != len(self.causal_lm.model.layers):
            raise ValueError(
                "a row was computed anew at LongRoPE's original length, apart from the others: hidden states of all "
                "rows come with use_cache=False"
            )
        wants_routing = self.config.output_router_logits if output_router_logits is None else output_router_logits
        aux_loss = self._balancing_loss(output, attention_mask) if wants_routing and output.router_outputs else None
        loss = self._total_loss(output.loss, aux_loss, targets, num_items_in_batch)
        result = model_output(
            self.causal_lm.config.is_sparse,
            loss=loss,
            aux_loss=aux_loss,
            logits=output.logits,
            cache=cache,
            hidden_states=(*states, output.hidden_states) if wants_states else None,
            router_logits=output.router_logits if wants_routing and output.router_outputs else None,
        )
        return result.to_tuple() if return_dict is False else result

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return self.causal_lm.device

    def train(self, mode: bool = True) -> "WrappedCausalLM":
        """As of any module, save that routers stay in evaluation mode where ``config.router_sampling`` is off."""
        super().train(mode)
        if not self.config.router_sampling:
            for module in self.causal_lm.modules():
                if hasattr(module, "input_jitter_noise") or hasattr(module, "selection_bias"):
                    module.training = False
        return self

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass.

        Args:
            activation_checkpointing_kwargs: ``use_reentrant`` (by default False) picks torch's form.
            every_n_layers: 1: all of them.
            offload: not supported.

        Raises:
            ValueError: for other options.
        """
        given = dict(activation_checkpointing_kwargs or {})
        reentrant = given.pop("use_reentrant", False)
        others = {"offload": offload, "every_n_layers": every_n_layers if every_n_layers != 1 else None}
        refuse(given | others, "gradient checkpointing")
        self.causal_lm.gradient_checkpointing = "reentrant" if reentrant else True
        if reentrant:  # torch's older form gives no gradient where no input wants one, as under adapters
            self.enable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.causal_lm.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of ``activation_checkpointing_enable``."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of ``activation_checkpointing_disable``."""
        self.activation_checkpointing_disable()

    @property
    def base_model(self) -> Backbone:  # type: ignore[override]
        """The decoder without the head."""
        return Backbone(self.causal_lm)

    def get_decoder(self) -> nn.Module:
        """The decoder's module."""
        return self.causal_lm.model

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.causal_lm.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another token embedding in its place; the head follows where the config ties them."""
        decoder = self.causal_lm.model
        decoder.embed_tokens = value = with_factor_of(value, decoder.embed_tokens)
        if self.causal_lm.config.tie_word_embeddings and isinstance(value, nn.Embedding):
            self.causal_lm.lm_head.weight = value.weight

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.causal_lm.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place; a plain linear layer becomes one that knows the loss, with its parameters."""
        if isinstance(new_embeddings, nn.Linear) and not isinstance(new_embeddings, LanguageModelHead):
            linear, config = new_embeddings, self.causal_lm.config
            head = LanguageModelHead(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                divisor=config.mup_width_multiplier,
                masked_ids=[token for token in config.dummy_token_indices if token < linear.out_features],
                device="meta",
            )
            head.weight, head.bias = linear.weight, linear.bias
            head.fused = getattr(self.causal_lm.lm_head, "fused", False)
            new_embeddings = head.train(linear.training)
        self.causal_lm.lm_head = new_embeddings

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """Point the head at the embedding, or give it a weight of its own, as ``config.tie_word_embeddings`` says."""
        if "causal_lm" not in self._modules:
            return
        model, tied = self.causal_lm, bool(self.config.tie_word_embeddings)
        if model.spread is not None and tied == model.config.tie_word_embeddings:
            return  # the hooks hold what is tied
        if tied != model.config.tie_word_embeddings:
            self._take_config()
            if not tied:
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.tie_weights()
        self._name_tied_weights()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the size of the vocabulary, as transformers does; the model's config follows.

        Raises:
            ValueError: where embedding or head are held in few bits, or the model is spread over devices.
        """
        if self.causal_lm.spread is not None:
            raise ValueError("embedding and head must be resized on one device: load the model without a device_map")
        parts = (self.get_input_embeddings(), self.get_output_embeddings())
        if not isinstance(parts[0], nn.Embedding) or not isinstance(parts[1], nn.Linear):
            raise ValueError("embedding and head must be unquantized to be resized: quantize the model afterwards")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self._take_config()
        return embeddings

    def _makes_cache(self, use_cache: bool | None, labels: torch.Tensor | None) -> bool:
        if use_cache is None:
            return bool(self.config.use_cache) and labels is None and not torch.is_grad_enabled()
        if use_cache and self.training and self.causal_lm.gradient_checkpointing:
            warnings.warn("gradient checkpointing keeps no cache: use_cache=True has no effect", stacklevel=3)
            return False
        return use_cache

    def _run(
        self,
        cache: Any,
        inputs: dict[str, Any],
        others: dict[str, torch.Tensor | None],
        targets: torch.Tensor | None,
    ) -> CausalLMOutput:
        """The pass itself, with a mean loss where there are targets."""
        if cache is None:
            return self.causal_lm(**inputs, **others, targets=targets, return_logits=True)
        pixel_values, ids = others["pixel_values"], inputs["input_ids"]
        if pixel_values is not None:
            decoder = self.causal_lm.model
            if ids is None or decoder.vision_embed_tokens is None:
                raise ValueError("pixel_values need input_ids, and a model with an image path")
            embeds = decoder.embed_tokens(ids.clamp(min=0))
            placed = decoder.vision_embed_tokens(ids, embeds, pixel_values, others["image_sizes"])
            embeds = placed.to(embeds.device)  # the tower may lie on another
            inputs = inputs | {"input_ids": None, "inputs_embeds": embeds}
        output = cache.extend(self.causal_lm, **inputs)
        if targets is not None:
            output.loss = loss_from_logits(output.logits, targets.to(output.logits.device))
        return output

    def _balancing_loss(self, output: CausalLMOutput, attention_mask: torch.Tensor | None) -> torch.Tensor:
        assert output.hidden_states is not None
        if attention_mask is not None:
            attention_mask = attention_mask[:, -output.hidden_states.shape[1] :]
        routing = output.router_outputs
        if (spread := self.causal_lm.spread) is not None:
            routing = tuple(one.to(spread.inputs) for one in routing)
        return resolve("losses.load_balancing")(routing, attention_mask)

    def _total_loss(
        self,
        loss: torch.Tensor | None,
        aux_loss: torch.Tensor | None,
        targets: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> torch.Tensor | None:
        if loss is None or targets is None:
            return None
        if aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if num_items is None:
            return loss
        share = (targets >= 0).sum().clamp(min=1).to(loss.device) / torch.as_tensor(num_items, device=loss.device)
        return loss * share

    def _unwritten(self) -> dict[str, list[int]]:
        """The image token, which the next pass would take for a picture's place, is never generated."""
        vision = self.causal_lm.config.vision
        return {} if vision is None else {"suppress_tokens": [vision.image_token_id]}

    def _name_tied_weights(self) -> None:
        self.all_tied_weights_keys: dict[str, str] = {}
        if self.causal_lm.config.tie_word_embeddings:
            self.all_tied_weights_keys = {"causal_lm.lm_head.weight": "causal_lm.model.embed_tokens.weight"}


def _classes(model_type: str) -> tuple[type[WrappedConfig], type[WrappedCausalLM]]:
    config, name = config_class(model_type), ARCHITECTURES[model_type]
    return config, type(name, (WrappedCausalLM,), {"config_class": config, "__module__": __name__})


CLASSES = {model_type: _classes(model_type) for model_type in ARCHITECTURES}
"""Config and model class of each model type."""
