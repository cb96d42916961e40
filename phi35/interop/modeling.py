"""Classes of transformers around ``CausalLM``: the same modules, weights read and written by this package.

Generation of transformers runs without a cache: every step computes the whole row, so that a row that outgrows
LongRoPE's short factors is computed under the long ones, as ``phi35.generate`` does in its "reference" mode.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from phi35.config import ModelConfig
from phi35.config_io import ARCHITECTURES, from_hf_dict, to_generation_dict, to_hf_dict
from phi35.loading import create, load, save
from phi35.model import CausalLM

_SHOWN = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()
_HARMLESS = {
    "trust_remote_code",
    "_from_auto",
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
    "_commit_hash",
}


class WrappedConfig(PreTrainedConfig):
    """A config of transformers that holds this package's own, which alone decides.

    Attributes:
        model_config: what the model is built from; the sizes beside it are copies to read.
    """

    model_config: Any = None

    @classmethod
    def of(cls, model_config: ModelConfig) -> Any:
        """The config around one of this package."""
        config = cls(architectures=[ARCHITECTURES[cls.model_type]])
        for name in _SHOWN:
            setattr(config, name, getattr(model_config, name))
        config.model_config = model_config
        config.use_cache = False
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The config of a ``config.json``; with ``return_unused_kwargs`` the options come back too."""
        options.pop("_from_auto", None)
        unused = options.pop("return_unused_kwargs", False)
        name = options.pop("name_or_path", None)
        config = cls.of(from_hf_dict(config_dict))
        config.name_or_path = str(name or "")
        return (config, options) if unused else config

    def to_dict(self) -> dict[str, Any]:
        """Contents of ``config.json`` in the published names."""
        return to_hf_dict(self.model_config, self.dtype or torch.float32)

    def to_diff_dict(self) -> dict[str, Any]:
        """As ``to_dict``: a published file names its defaults."""
        return self.to_dict()


class WrappedCausalLM(PreTrainedModel, GenerationMixin):
    """A ``CausalLM`` as a model of transformers.

    Attributes:
        causal_lm: the model itself, as ``phi35.load`` gives it.
    """

    config_class: Any = WrappedConfig
    base_model_prefix = "causal_lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: WrappedConfig, causal_lm: CausalLM | None = None) -> None:
        super().__init__(config)
        self.causal_lm = create(config.model_config) if causal_lm is None else causal_lm
        self.config.dtype = self.causal_lm.dtype
        self.all_tied_weights_keys: dict[str, str] = {}
        if config.model_config.tie_word_embeddings:
            self.all_tied_weights_keys = {"causal_lm.lm_head.weight": "causal_lm.model.embed_tokens.weight"}
        self.generation_config = GenerationConfig(**to_generation_dict(config.model_config), use_cache=False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        config: WrappedConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> Any:
        """The model of a folder or hub id, its weights read by ``phi35.load``.

        Args:
            folder: as ``phi35.load`` takes it.
            config: what ``AutoConfig`` gave; the folder's own files decide.
            dtype: of the weights; by default as stored.
            torch_dtype: the older name of ``dtype``.
            device_map: one device, such as "cpu", "cuda:0" or {"": 0}; by default the CPU.
            **options: of transformers; those that would change what is loaded are refused.

        Raises:
            ValueError: for an option or map that is not supported, and as ``phi35.load``.
        """
        _refuse({key: value for key, value in options.items() if key not in _HARMLESS}, "from_pretrained")
        device = _one_device(device_map)
        picked = dtype if dtype is not None else torch_dtype
        causal_lm, _ = load(folder, device=device, dtype="auto" if picked is None else picked)
        wrapped_config = cls.config_class.of(causal_lm.config)
        wrapped_config.name_or_path = str(folder)
        return cls(wrapped_config, causal_lm).eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Write weights and config in the published names, as ``phi35.save``.

        Raises:
            ValueError: for options that would change what is written, and as ``phi35.save``.
        """
        _refuse({key: value for key, value in options.items() if key != "safe_serialization"}, "save_pretrained")
        if is_main_process:
            save(self.causal_lm, None, save_directory, max_shard_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        past_key_values: None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """One pass without a cache; arguments as of ``CausalLM.forward``.

        Returns:
            loss (with labels; the cross-entropy alone, without the router's losses) and logits (B, T, V), as a tuple
            with ``return_dict=False``.

        Raises:
            ValueError: for a cache, and as ``CausalLM.forward``.
        """
        if use_cache or past_key_values is not None:
            raise ValueError("the transformers classes keep no cache: leave out use_cache and past_key_values")
        output = self.causal_lm(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            logits_to_keep=logits_to_keep,
            return_logits=True,
        )
        result = CausalLMOutputWithPast(loss=output.loss, logits=output.logits)
        return result.to_tuple() if return_dict is False else result

    def generate(self, inputs: torch.Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        """Generation of transformers, without a cache.

        Raises:
            ValueError: for ``use_cache=True``; ``causal_lm.generate`` and ``phi35.generate`` keep one.
        """
        if options.pop("use_cache", None):
            raise ValueError("the transformers classes keep no cache: call model.causal_lm.generate, which keeps one")
        return super().generate(inputs, *arguments, use_cache=False, **options)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one step: the whole row, its mask and its pictures."""
        names = ("attention_mask", "pixel_values", "image_sizes")
        return {"input_ids": input_ids, "logits_to_keep": 1} | {name: kwargs.get(name) for name in names}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute layers in the backward pass; ``use_reentrant`` (by default False) picks torch's form."""
        given = dict(gradient_checkpointing_kwargs or {})
        reentrant = given.pop("use_reentrant", False)
        _refuse(given | options, "gradient_checkpointing_enable")
        self.causal_lm.gradient_checkpointing = "reentrant" if reentrant else True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.causal_lm.gradient_checkpointing = False

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.causal_lm.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head."""
        return self.causal_lm.lm_head

    def tie_weights(self, *arguments: Any, **options: Any) -> None:
        """Point the head at the embedding where the config ties them."""
        self.causal_lm.tie_weights()

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        """Refused: the vocabulary is part of the frozen config.

        Raises:
            ValueError: always.
        """
        raise ValueError("the vocabulary of a loaded model is fixed: resize_token_embeddings is not supported")


def _classes(model_type: str) -> tuple[type[WrappedConfig], type[WrappedCausalLM]]:
    name = ARCHITECTURES[model_type].removesuffix("ForCausalLM")
    config_class = type(f"{name}Config", (WrappedConfig,), {"model_type": model_type, "__module__": __name__})
    model_class = type(f"{name}ForCausalLM", (WrappedCausalLM,), {"config_class": config_class, "__module__": __name__})
    return config_class, model_class


def _refuse(options: dict[str, Any], where: str) -> None:
    given = sorted(name for name, value in options.items() if value not in (None, False))
    if given:
        raise ValueError(f"{where} does not support {given} for the models of phi35: leave them out")


def _one_device(device_map: Any) -> torch.device:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) != 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
        raise ValueError(f"device_map must name one device, such as 'cuda:0' or {{'': 0}}, got {device_map!r}")
    device = devices.pop()
    return torch.device("cpu" if device is None else device)


CLASSES = {model_type: _classes(model_type) for model_type in ARCHITECTURES}
"""Config and model class of each model type."""
