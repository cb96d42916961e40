"""The one description of a training run: a frozen dataclass, read from YAML and ``key=value`` overrides.

It is validated before anything is allocated, with all problems in one message; ``resolve`` replaces what depends
on the number of processes by numbers, so that the config that is printed and saved holds no open value.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from phi35.adapters.config import AdapterConfig
from phi35.training.config_checks import type_problems, value_problems


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that defines a training run.

    Attributes:
        model: preset name (random weights) or folder of a checkpoint in Hugging Face form.
        model_overrides: fields of the model's config to change; a folder's weights must fit all the same.
        tower: safetensors file with weights of the vision tower, loaded after the model is built; None for none.
        processor: folder of the tokenizer (and processor) where the model folder has none; None for the small
            tokenizer in the package.
        data: folder with text files ("stdlib": the interpreter's own library sources) or with image shards
            ("easy-vqa": written from the easy-vqa package on first use).
        data_source: registry string of the function that opens the data; None chooses by the model.
        data_options: further keyword arguments of that function.
        num_workers: processes that load data, per rank (image data).
        sequence_length: tokens of a packed text sample.
        global_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: samples of one forward pass on one rank; None: global_batch_size / ranks.
        max_steps: optimizer steps of the run.
        preference: learn from pairs of replies (``phi35.training.preference.PreferenceConfig``: loss, beta,
            label_smoothing, reference, routing_noise), which ``data`` then holds.
        learning_rate: peak rate.
        learning_rates: peak rates of single parts (``PARTS``) in place of ``learning_rate``.
        freeze: parts that are not trained.
        adapter: train a LoRA adapter and nothing else (``phi35.adapters.config.AdapterConfig``: rank, alpha, dropout,
            targets, dora, rslora); checkpoints then hold the adapter alone, beside which ``model`` must stay.
        schedule: "cosine", "linear", "wsd" or "constant".
        warmup_steps: steps of the linear rise.
        decay_steps: steps of the last part of "wsd".
        min_lr_ratio: floor of the schedule as a part of the peak.
        weight_decay: of matrices; norms, biases and other vectors are never decayed.
        decay_embeddings: whether token embeddings and the output head are decayed too.
        optimizer: "adamw"; "adamw8bit" with 8-bit moments (bitsandbytes); "muon" for the inner matrices, with AdamW
            for everything else.
        ema_decay: of an exponential moving average of the trained weights, in float32; 0 for none.
        adam_betas: AdamW's betas.
        adam_epsilon: AdamW's epsilon.
        gradient_clipping: largest global gradient norm; 0 for no clipping.
        dtype: "float32", or "bfloat16" with float32 master weights.
        optimizer_dtype: "float32", or "bfloat16" for masters and moments with stochastic rounding (8 bytes a parameter
            in place of 16; dtype bfloat16 at zero_stage 0).
        zero_stage: 0 to 3; None: 0 for one process, else 2.
        offload: "none", or "optimizer": master weights and moments in host memory.
        ep_size: ranks that share one set of experts; None: the greatest common divisor of ranks and experts
            (1 for dense models and ZeRO-3).
        ep_chunks: pieces in which tokens travel to experts, under each other's products; None for 1.
        sequence_parallel_size: neighbouring ranks that share each row, a stretch of its tokens and a part of the
            attention heads each (Ulysses), for samples too long for one GPU.
        gradient_checkpointing: what the backward pass computes again: True for each whole layer, "selective" for what
            costs no matrix product (norms and activations).
        kernels: "fused" for Triton kernels where several operations read the same data, "torch" for torch's own;
            "auto" takes the former on CUDA.
        compile: each decoder layer and tower block through torch.compile, in place of the fused kernels.
        router_aux_loss_coef: weight of the load-balance loss; None takes the model config's.
        router_z_loss_coef: weight of the router's z-loss.
        router_bias_update_rate: step of the selection bias that balances experts without a loss (arXiv 2408.15664,
            which uses 0.001); 0 for no bias.
        seed: of weights, data order, dropout and routing noise.
        init_device: where random weights are drawn: "cpu" gives the same on every machine, "cuda" is many times faster
            and gives others.
        output_dir: folder of everything the run writes.
        save_interval: steps between checkpoints; 0: only at the end.
        keep_last: checkpoints kept; 0 keeps all.
        eval_interval: steps between evaluations on held-out data, one at the end besides; 0 for none.
        eval_samples: samples of an evaluation.
        eval_data: folder of held-out data of the same form as ``data``; None keeps a part of ``data`` from training.
        held_out: that part.
        eval_questions: of each kind of easy-vqa's test questions, asked at every evaluation (vision models).
        keep_best: checkpoints with the lowest held-out losses that stay.
        keep_every: checkpoints of every this-many-th step are kept for good; 0 for none.
        async_save: write checkpoints beside the training, which waits for the copy to host memory alone.
        max_skipped_steps: updates in a row that may be left out because loss or gradient is not finite; 0: any number.
        on_skipped_steps: what happens then: "stop", or "rollback" to the last checkpoint, without the data since.
        spike_threshold: standard deviations by which a loss above the mean of the last ones makes the run roll back
            likewise; 0 for never.
        spike_window: how many losses the mean is of.
        max_rollbacks: rollbacks without a new checkpoint in between, after which the run stops.
        hang_timeout_seconds: a rank without progress for so long ends the run with its stacks; 0 for never.
        resume: continue from the newest complete checkpoint of ``output_dir``, if there is one.
        log_interval: steps between two reads of the losses from the device; metrics hold every step all the same.
        trackers: where the numbers go besides the terminal and ``metrics.jsonl``: "tensorboard", "wandb"; None takes
            TensorBoard where it is installed.
        wandb_options: keyword arguments of ``wandb.init`` (project, name, mode: offline, ...).
        peak_flops: a device's peak per second for MFU; None takes that of ``phi35.training.flops`` by its name.
        export: write the final model in Hugging Face form to ``<output_dir>/model``.
        export_average: write the average of the weights (``ema_decay``) there instead.
        export_merged: of a run with an ``adapter``, which is written to ``<output_dir>/adapter`` in PEFT's form, write
            the model with the adapter merged into its weights besides.
    """

    model: str = "tiny-phi-3.5-mini"
    model_overrides: dict[str, Any] = field(default_factory=dict)
    tower: str | None = None
    processor: str | None = None
    data: str = "stdlib"
    data_source: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    num_workers: int = 0
    sequence_length: int = 128
    global_batch_size: int = 8
    micro_batch_size: int | None = None
    max_steps: int = 100
    learning_rate: float = 3e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    adapter: dict[str, Any] | None = None
    preference: dict[str, Any] | None = None
    schedule: str = "cosine"
    warmup_steps: int = 10
    decay_steps: int = 0
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    optimizer: str = "adamw"
    ema_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_epsilon: float = 1e-8
    gradient_clipping: float = 1.0
    dtype: str = "float32"
    optimizer_dtype: str = "float32"
    zero_stage: int | None = None
    offload: str = "none"
    ep_size: int | None = None
    ep_chunks: int | None = None
    sequence_parallel_size: int = 1
    gradient_checkpointing: bool | str = False
    kernels: str = "auto"
    compile: bool = False
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float = 0.0
    router_bias_update_rate: float = 0.0
    seed: int = 0
    init_device: str = "cpu"
    output_dir: str = "runs/default"
    save_interval: int = 0
    keep_last: int = 2
    keep_every: int = 0
    eval_interval: int = 0
    eval_samples: int = 64
    eval_data: str | None = None
    held_out: float = 0.02
    eval_questions: int = 0
    keep_best: int = 0
    async_save: bool = False
    max_skipped_steps: int = 10
    on_skipped_steps: str = "stop"
    spike_threshold: float = 0.0
    spike_window: int = 50
    max_rollbacks: int = 3
    hang_timeout_seconds: float = 1800.0
    resume: bool = True
    log_interval: int = 1
    trackers: tuple[str, ...] | None = None
    wandb_options: dict[str, Any] = field(default_factory=dict)
    peak_flops: float | None = None
    export: bool = True
    export_average: bool = False
    export_merged: bool = False

    def __post_init__(self) -> None:
        for name in ("freeze", "adam_betas", "trackers"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [*type_problems(self)] or [*value_problems(self)]
        if problems:
            raise ValueError("invalid training config: " + "; ".join(problems))

    @property
    def adapts_experts(self) -> bool:
        """Whether the run's adapter sits on experts, where the model has some."""
        if self.adapter is None:
            return False
        adapter = AdapterConfig.of(self.adapter)
        return "experts" in adapter.targets if adapter.targets is not None else not adapter.dora

    @property
    def is_resolved(self) -> bool:
        """Whether no field is left open."""
        return None not in (self.micro_batch_size, self.zero_stage, self.ep_size, self.router_aux_loss_coef)

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks, or groups of ranks that share rows, with batches of their own."""
        return world_size // self.sequence_parallel_size

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Forward passes of one rank in one optimizer step."""
        size = self.data_parallel_size(world_size)
        micro_batch_size = self.micro_batch_size or max(1, self.global_batch_size // size)
        return self.global_batch_size // (micro_batch_size * size)

    def replace(self, **changes: Any) -> "TrainingConfig":
        """A copy with some fields changed.

        Raises:
            ValueError: for unknown fields, all of them named, or an inconsistent result.
        """
        _check_known(changes)
        return dataclasses.replace(self, **changes)

    def resolve(self, *, world_size: int, num_experts: int = 0, router_aux_loss_coef: float = 0.0) -> "TrainingConfig":
        """The config with every open field filled for ``world_size`` processes.

        Args:
            world_size: number of processes.
            num_experts: experts of a sparse layer; 0 for dense models.
            router_aux_loss_coef: the model config's weight of the balance loss.

        Raises:
            ValueError: where batch sizes, experts and processes do not divide, all problems at once.
        """
        problems = []
        micro_batch_size, ep_size, zero_stage = self.micro_batch_size, self.ep_size, self.zero_stage
        if zero_stage is None:
            # Sharding over one process only copies: the optimizer then works on the gradients where they lie. Over
            # several, DeepSpeed keeps the gradients whole at stage 1, in float32 and in bfloat16.
            zero_stage = 0 if world_size == 1 and self.offload == "none" else 2
        if world_size % self.sequence_parallel_size:
            problems.append(
                f"sequence_parallel_size ({self.sequence_parallel_size}) must divide the number of processes "
                f"({world_size})"
            )
        data_parallel_size = max(1, self.data_parallel_size(world_size))
        if micro_batch_size is None:
            micro_batch_size = max(1, self.global_batch_size // data_parallel_size)
        if self.global_batch_size % (micro_batch_size * data_parallel_size):
            sharing = " that share no rows" if self.sequence_parallel_size > 1 else ""
            problems.append(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size x processes"
                f"{sharing} ({micro_batch_size} x {data_parallel_size})"
            )
        if ep_size is None and self.adapts_experts:
            ep_size = 1
        if ep_size is None:
            ep_size = math.gcd(world_size, num_experts) if num_experts and zero_stage < 3 else 1
        if self.router_bias_update_rate and not num_experts:
            problems.append(f"router_bias_update_rate balances experts; {self.model!r} is dense")
        if ep_size > 1 and not num_experts:
            problems.append(f"ep_size={ep_size} needs a model with experts; {self.model!r} is dense")
        elif ep_size > 1 and (world_size % ep_size or num_experts % ep_size):
            problems.append(
                f"ep_size ({ep_size}) must divide both processes ({world_size}) and experts ({num_experts})"
            )
        if num_experts and (ep_size or 1) > 1 and self.adapts_experts:
            problems.append("adapters of experts need whole experts on each rank: set ep_size=1, or other targets")
        if self.sequence_parallel_size > 1 and self.compile:
            problems.append("compile=true takes whole layers, and processes that share rows exchange heads within them")
        if ep_size > 1 and self.compile:
            problems.append(
                "compile=true takes whole layers, and experts spread over processes read counts on the host"
            )
        if ep_size > 1 and zero_stage == 3:
            problems.append("expert parallelism runs with zero_stage 0 to 2; set zero_stage=2 or ep_size=1")
        if self.gradient_checkpointing == "selective" and zero_stage == 3:
            problems.append("gradient_checkpointing='selective' needs zero_stage 0 to 2: ZeRO-3 takes weights away")
        if self.optimizer_dtype == "bfloat16" and zero_stage > 0:
            problems.append(f"optimizer_dtype='bfloat16' needs zero_stage=0, which {zero_stage} is not")
        if problems:
            raise ValueError("training config does not fit this run: " + "; ".join(problems))
        aux = self.router_aux_loss_coef if self.router_aux_loss_coef is not None else router_aux_loss_coef
        return dataclasses.replace(
            self,
            micro_batch_size=micro_batch_size,
            zero_stage=zero_stage,
            ep_size=ep_size,
            router_aux_loss_coef=aux if num_experts else 0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def read_config(
    path: str | Path | None = None, overrides: list[str] | None = None, defaults: dict[str, Any] | None = None
) -> TrainingConfig:
    """A config from defaults, a YAML file and command-line overrides, the later winning.

    Args:
        path: YAML file with fields of ``TrainingConfig``.
        overrides: "key=value" strings; values are read as YAML, "model_overrides.num_hidden_layers=2" reaches into
            a field that is a dict.
        defaults: values below the file's.

    Raises:
        ValueError: for unreadable files, unknown keys (all of them named) and invalid values.
    """
    return TrainingConfig(**read_settings(path, overrides, defaults))


def read_settings(
    path: str | Path | None = None, overrides: list[str] | None = None, defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The fields that ``read_config`` makes a config of, without those that nobody gave.

    Raises:
        ValueError: for unreadable files and unknown keys, all of them named.
    """
    values: dict[str, Any] = dict(defaults or {})
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"training config {str(path)!r} does not exist; give the path of a YAML file")
        loaded = _yaml(Path(path).read_text(), f"training config {str(path)!r}")
        if not isinstance(loaded, dict):
            raise ValueError(f"training config {str(path)!r} must hold 'key: value' lines, got {type(loaded).__name__}")
        values.update(loaded)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"expected key=value, got {override!r}")
        value = _yaml(text, repr(override))
        name, dot, inner = key.strip().removeprefix("--").partition(".")
        if dot:
            outer = dict(values.get(name) or {})
            outer[inner] = value
            value = outer
        values[name] = value
    _check_known(values)
    return {name: _with_numbers(name, value) for name, value in values.items()}


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _with_numbers(name: str, value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text: make it a number in the fields that hold numbers."""
    if isinstance(value, dict) and name == "learning_rates":
        return {part: _with_numbers("learning_rate", rate) for part, rate in value.items()}
    if not isinstance(value, str) or float not in (_FIELD_TYPES[name], *get_args(_FIELD_TYPES[name])):
        return value
    try:
        return float(value)
    except ValueError:
        return value


_FIELD_TYPES = get_type_hints(TrainingConfig)


def _check_known(values: dict[str, Any]) -> None:
    known = {item.name for item in dataclasses.fields(TrainingConfig)}
    unknown = sorted(set(values) - known, key=str)
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(str(name), known, n=1)]
        hint = f"; did you mean {near}?" if near else "."
        raise ValueError(f"unknown training config keys {unknown}{hint} Known keys are {sorted(known)}")
