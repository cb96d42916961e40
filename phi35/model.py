"""The base decoder of the Phi-3 and Phi-3.5 series (arXiv 2404.14219) and its language model head.

Pre-norm blocks with two slots filled from the config: the feed-forward of each layer (dense here, sparse from
``moe``) and the image embedding (from ``vision``). In-memory names are the published ``phi3`` names for every
family; other families' names are mapped at the checkpoint's edge.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from phi35.activation_checkpointing import checkpoint_layer
from phi35.attention import Attention, AttentionPlan, plan_attention
from phi35.cache import KVCache
from phi35.config import ModelConfig
from phi35.device import Spread
from phi35.jitter import Jitter
from phi35.language_model_head import build_head, loss_from_logits, losses_from_logits, shift_labels
from phi35.norm import RMSNorm, build_norm
from phi35.outputs import CausalLMOutput, RouterOutput
from phi35.packed_attention import ignore_first_tokens
from phi35.recompute import given_again
from phi35.registry import resolve
from phi35.rope import RotaryEmbedding
from phi35.sequence_parallel import SequenceParallel
from phi35.token_embedding import build_token_embedding


class CausalLM(nn.Module):
    """A decoder with its head: any model of the family, as its config says.

    Attributes:
        config: the frozen config the model was built from.
        gradient_checkpointing: recompute each layer, and each block of an image tower, in the backward pass
            (training mode only); the random state is restored, so that routing noise and dropout repeat. True takes
            torch's non-reentrant form, "reentrant" its older one for the decoder's layers. "selective" computes
            again what costs no matrix product, the decoder's norms and activations, and keeps the rest.
        processor: tokenizer and image settings of the folder a model was loaded from (set by ``phi35.load``), so
            that ``phi35.generate`` takes the model alone.
        image_feature_cache: where ``generate`` and the batcher keep features of pictures by content
            (``phi35.image_cache.ImageFeatureCache``); None keeps none. ``phi35.generate`` gives one to models that it
            loads, the batcher to the one that it serves.
        spread: where the parts compute, of a model that ``phi35.interop`` has put on several devices; None: all of
            them where their weights are.
    """

    processor: Any = None
    image_feature_cache: Any = None
    spread: Spread | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = build_head(config)
        self.tie_weights()
        if config.quantization is not None:
            resolve("phi35.quantization.modules:quantize_structure")(self, config)

    def tie_weights(self) -> None:
        """Point the head at the embedding where the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def gradient_checkpointing(self) -> bool | str:
        """Whether each layer is recomputed in the backward pass, and by which form."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool | str) -> None:
        if enabled not in (False, True, "selective", "reentrant"):
            raise ValueError(f"gradient_checkpointing must be False, True, 'selective' or 'reentrant', got {enabled!r}")
        self.model.gradient_checkpointing = enabled
        for module in self.modules():
            if hasattr(type(module), "lean"):
                module.lean = enabled == "selective"  # type: ignore[assignment]
        if self.model.vision_embed_tokens is not None:
            self.model.vision_embed_tokens.gradient_checkpointing = enabled in (True, "reentrant")

    @property
    def device(self) -> torch.device:
        """Where inputs belong: device of the decoder's final norm, or of the embedding where the parts are spread."""
        if self.spread is not None:
            return self.spread.inputs
        return self.model.norm.get_parameter("weight").device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder's final norm, which is never quantized."""
        return self.model.norm.get_parameter("weight").dtype

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        rope_lengths: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        sequence_lengths: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        padding_side: str | None = None,
        loss_per_token: bool = False,
    ) -> CausalLMOutput:
        """One pass over a chunk of T tokens.

        Args:
            input_ids: (B, T) int64; -i stands where features of the row's image i go.
            attention_mask: (B, T) or (B, past + T), nonzero for real tokens, padding on either side.
            position_ids: (B, T) int64; by default the running count of each row's real tokens.
            past_key_values: cache to read and extend.
            inputs_embeds: (B, T, D) in place of ``input_ids``.
            labels: (B, T) int64, shifted inside; -100 and all other negative ids do not count.
            use_cache: make a growing cache where none is given.
            pixel_values: (C, 3, S, S) crops of all images of the batch, in order, each global view first.
            image_sizes: (N, 2) int64 height and width of each image after padding.
            rope_lengths: (B,) int64 total length each row will reach, which chooses its LongRoPE factors.
            logits_to_keep: compute logits for the last n positions alone; 0 for all.
            return_logits: by default True, save in training mode with labels, where they are never held whole.
            sequence_lengths: (B, S) int64, best on the host: each row holds S samples one after another, of these
                lengths (zeros fill up, and what they leave of the row is padding). Each sample attends to itself
                alone, has positions from 0, LongRoPE's factors by its own length, and no label for its first token.
            targets: (B, T) int64, labels that already stand where they are predicted, in place of ``labels``.
            padding_side: "right" promises that ``attention_mask`` pads on the right alone: no real token sees padding
                then, and attention needs no mask. None: on any side.
            loss_per_token: make the loss (B, T) float32, the cross-entropy at each position that predicts a label, 0 at
                others.

        Raises:
            ValueError: for inputs that contradict each other, or an unannounced LongRoPE crossing of a cached row.
        """
        self._check_inputs(input_ids, inputs_embeds, labels, logits_to_keep, padding_side)
        if self.spread is not None:
            self.spread.check(self)
        if labels is not None:
            targets = self._aligned(labels, targets, sequence_lengths)
        if past_key_values is not None and not isinstance(past_key_values, KVCache):
            raise ValueError(f"past_key_values must come from new_cache(), got {type(past_key_values).__name__}")
        if past_key_values is None and use_cache:
            given = input_ids if input_ids is not None else inputs_embeds
            assert given is not None
            past_key_values = self.new_cache(given.shape[0])
        hidden_states, router_outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            rope_lengths=rope_lengths,
            padding_side=padding_side,
            sequence_lengths=sequence_lengths,
        )
        if return_logits is None:
            return_logits = targets is None or not self.training
        loss: torch.Tensor | None = None
        logits: torch.Tensor | None = None
        if return_logits:
            logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
            if self.spread is not None:
                logits = logits.to(self.spread.inputs)
        if targets is not None:
            targets = targets.to(hidden_states.device if logits is None else logits.device)
            if targets.shape != hidden_states.shape[:2]:
                expected = tuple(hidden_states.shape[:2])
                raise ValueError(f"targets must be {expected} like the inputs, got {tuple(targets.shape)}")
            if logits is not None and not logits_to_keep:
                loss = (losses_from_logits if loss_per_token else loss_from_logits)(logits, targets)
            elif loss_per_token:
                loss = self.lm_head(hidden_states, targets, per_token=True)
            else:
                loss = self.lm_head(hidden_states, targets)
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            router_outputs=router_outputs,
            hidden_states=hidden_states,
        )

    def new_cache(self, batch_size: int, max_length: int | None = None, kv_cache_dtype: str | None = None) -> KVCache:
        """An empty cache on the model's device: preallocated for ``max_length`` tokens a row, or growing.

        ``kv_cache_dtype`` "int8" or "fp8" stores keys and values in eight bits, None in the model's dtype.
        """
        layers = None if self.spread is None else self.spread.layers
        return KVCache(self.config, batch_size, max_length, self.device, self.dtype, kv_cache_dtype, layers)

    def image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> list[torch.Tensor]:
        """Features (tokens_i, D) of each image, as they enter the decoder.

        Args:
            pixel_values: (C, 3, S, S) crops of all images.
            image_sizes: (N, 2) heights and widths after padding.

        Raises:
            ValueError: for a text-only model, and one that is spread over devices.
        """
        if self.model.vision_embed_tokens is None:
            raise ValueError("this model is text-only and has no image features: its config has no vision part")
        if self.spread is not None:
            raise ValueError("image features alone need a model on one device: give pixel_values to the model itself")
        return self.model.vision_embed_tokens.features(pixel_values, image_sizes)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Continue prompts; see ``phi35.generation.decoding.generate`` for the options.

        Args:
            input_ids: (B, T) int64.
            **options: the processor's other outputs and the decoding options.

        Returns:
            (B, T + new) int64.
        """
        return resolve("phi35.generation.decoding:generate")(self, input_ids, **options)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> None:
        """Draw all parameters anew: norms 1, biases 0, all else normal with ``initializer_range``.

        Quantized weights get random codes of that deviation.
        A process's part of the experts receives what it would hold of the whole experts' numbers.

        Args:
            generator: draws on its own device, one parameter at a time; None takes torch's global one.
            dtype: in which numbers are drawn before they are rounded to a parameter's own; None draws in that.
        """
        done: set[int] = set()
        for module in self.modules():
            if callable(draw_codes := getattr(module, "draw_codes", None)):
                draw_codes(self.config.initializer_range, generator)
            if isinstance(module, RMSNorm | nn.LayerNorm):
                module.weight.fill_(1.0)
                done.add(id(module.weight))
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()
                done.add(id(bias))
        for parameter in self.parameters():
            if id(parameter) not in done:
                _draw_normal(parameter, self.config.initializer_range, generator, dtype)

    def _aligned(
        self, labels: torch.Tensor, targets: torch.Tensor | None, sequence_lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Labels (B, T) moved to the positions that predict them, never from one packed sample to another."""
        if targets is not None or self.model.sequence_parallel is not None:
            raise ValueError(
                "give targets alone where the labels are aligned already, as processes that share rows need them: the "
                "last token of a stretch predicts the first of the next"
            )
        return shift_labels(labels if sequence_lengths is None else ignore_first_tokens(labels, sequence_lengths))

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        labels: torch.Tensor | None,
        logits_to_keep: int,
        padding_side: str | None,
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids (B, T) and inputs_embeds (B, T, D)")
        given = input_ids if input_ids is not None else inputs_embeds
        for name, ids in (("input_ids", input_ids), ("labels", labels)):
            if ids is not None and (not isinstance(ids, torch.Tensor) or ids.is_floating_point()):
                raise ValueError(f"{name} must be a tensor (B, T) of whole numbers, got {_shown(ids)}")
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"inputs_embeds must be a tensor (B, T, D), got {_shown(given)}")
        if given.dim() != (2 if input_ids is not None else 3):
            expected = "input_ids (B, T)" if input_ids is not None else "inputs_embeds (B, T, D)"
            raise ValueError(f"expected {expected}, got shape {tuple(given.shape)}")
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(f"the batch is empty: shape {tuple(given.shape)}; give at least one row of one token")
        if input_ids is None and given.shape[2] != self.config.hidden_size:
            raise ValueError(f"inputs_embeds must be {self.config.hidden_size} wide, got {tuple(given.shape)}")
        if labels is not None and labels.shape != given.shape[:2]:
            raise ValueError(f"labels must be {tuple(given.shape[:2])} like the inputs, got {tuple(labels.shape)}")
        if padding_side not in (None, "right"):
            raise ValueError(f"padding_side must be 'right' or None (any side), got {padding_side!r}")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all) or positive, got {logits_to_keep}")


def _shown(value: Any) -> str:
    return f"one of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _draw_normal(
    parameter: torch.Tensor, deviation: float, generator: torch.Generator | None, dtype: torch.dtype | None
) -> None:
    first, whole = getattr(parameter, "expert_shard", (0, None))
    device = parameter.device if generator is None else generator.device
    if whole is None and device == parameter.device and dtype in (None, parameter.dtype):
        parameter.normal_(0.0, deviation, generator=generator)
        return
    shape = (parameter.shape[0] if whole is None else whole, *parameter.shape[1:])
    numbers = torch.empty(shape, dtype=dtype or parameter.dtype, device=device)
    numbers.normal_(0.0, deviation, generator=generator)
    parameter.copy_(numbers[first : first + parameter.shape[0]])


class Decoder(nn.Module):
    """Embedding, layers and final norm.

    Attributes:
        gradient_checkpointing: as of ``CausalLM``.
        sequence_parallel: processes that share each row, or None. Then a pass takes and gives this process's stretch
            of the tokens, with ``sequence_lengths`` of the whole rows; a model with vision takes whole ``input_ids``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = build_token_embedding(config)
        self.vision_embed_tokens = None if config.vision is None else resolve("embedding.vision")(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.rope = RotaryEmbedding(config)
        self.gradient_checkpointing: bool | str = False
        self.sequence_parallel: SequenceParallel | None = None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        rope_lengths: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
        padding_side: str | None = None,
    ) -> tuple[torch.Tensor, tuple[RouterOutput, ...]]:
        """Hidden states (B, T, D) after the final norm, and each sparse layer's routing."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self._embed(input_ids, pixel_values, image_sizes, cached=cache is not None)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which say where the features go; inputs_embeds came instead")
        if self.sequence_parallel is not None and self.vision_embed_tokens is not None:
            inputs_embeds = self.sequence_parallel.local(inputs_embeds)  # pictures found their place in whole rows
        hidden_states = F.dropout(inputs_embeds, self.config.embd_pdrop, self.training)
        plan = plan_attention(
            self.config,
            self.rope,
            hidden_states,
            attention_mask,
            position_ids,
            cache,
            rope_lengths,
            sequence_lengths,
            self.sequence_parallel,
            padding_side,
        )
        if cache is not None and self.config.quantization is not None and hidden_states.device.type == "cpu":
            decoded = resolve("phi35.quantization.cpu.step:decode")(self, hidden_states, plan, cache)
            if decoded is not None:
                self._record(plan, cache)
                return decoded, ()
        router_outputs = []
        for layer in self.layers:
            if self.gradient_checkpointing in (True, "reentrant") and self.training:
                reentrant = self.gradient_checkpointing == "reentrant"
                hidden_states, routing = checkpoint_layer(layer, hidden_states, plan, cache, reentrant=reentrant)
            else:
                hidden_states, routing = layer(hidden_states, plan, cache)
            if routing is not None:
                router_outputs.append(routing)
        if cache is not None:
            self._record(plan, cache)
        return self.norm(hidden_states), tuple(router_outputs)

    @staticmethod
    def _record(plan: AttentionPlan, cache: KVCache) -> None:
        """What the cache holds after a pass."""
        if plan.lengths is not None:
            cache.lengths, cache.uniform_length = plan.lengths, plan.uniform_length
            cache.num_slots = plan.stored_slots

    def _embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        cached: bool,
    ) -> torch.Tensor:
        """Token embeddings (B, T, D) with image features in place."""
        if self.vision_embed_tokens is None:
            if pixel_values is not None:
                raise ValueError("this model is text-only: leave out pixel_values, or load a vision model")
            return self.embed_tokens(input_ids)
        inputs_embeds = self.embed_tokens(input_ids.clamp(min=0))
        # One cached token is an answer's, never an image's; looking for placeholders would cost a synchronisation.
        if cached and input_ids.shape[1] == 1 and pixel_values is None and input_ids.device.type != "cpu":
            return inputs_embeds
        embeds: torch.Tensor = self.vision_embed_tokens(input_ids, inputs_embeds, pixel_values, image_sizes)
        return embeds.to(inputs_embeds.device)  # the tower may lie on another


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Attributes:
        lean: normalise once more in the backward pass instead of keeping the results.
    """

    lean = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = resolve("feed_forward.sparse" if config.is_sparse_layer(layer) else "feed_forward.dense")(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.dropout = config.resid_pdrop
        self.fed_dropout = config.resid_pdrop if config.ffn_pdrop is None else config.ffn_pdrop

    def forward(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, cache: KVCache | None
    ) -> tuple[torch.Tensor, RouterOutput | None]:
        """Map (B, T, D) to (B, T, D) and, in a sparse layer, the routing."""
        stream, normed = self.input_layernorm(hidden_states, keep=True)
        with self._given_again(normed, self.input_layernorm, stream):
            attended = F.dropout(self.self_attn(normed, plan, cache), self.dropout, self.training)
        norm, jitter = self.post_attention_layernorm, self._jitter(attended)
        stream, normed = norm(attended, stream, keep=True, jitter=jitter)
        with self._given_again(normed, norm, stream, jitter):
            fed, routing = self.mlp(normed) if jitter is None else self.mlp(normed, jittered=True)
        return stream + F.dropout(fed, self.fed_dropout, self.training), routing

    def _jitter(self, hidden_states: torch.Tensor) -> Jitter | None:
        """The noise of a sparse feed-forward's input where the norm before it is fused, so that it costs no pass."""
        amount = getattr(self.mlp, "input_jitter_noise", 0.0)
        if not (amount > 0 and self.mlp.training and getattr(self.post_attention_layernorm, "fused", False)):
            return None
        return Jitter.draw(amount, hidden_states.device)

    def _given_again(
        self, normed: torch.Tensor, norm: nn.Module, stream: torch.Tensor, jitter: Jitter | None = None
    ) -> AbstractContextManager[Any]:
        source = stream.detach()
        return given_again(normed, lambda: norm(source, jitter=jitter), enabled=self.lean)
