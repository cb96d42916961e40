"""A training run from config to exported model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi35.adapters.config import AdapterConfig
from phi35.adapters.merging import check_mergeable
from phi35.config import ModelConfig
from phi35.registry import resolve
from phi35.training import checkpoint, environment
from phi35.training.build import build_model, build_processor, read_model_config
from phi35.training.checkpoint_files import CheckpointReader, set_aside
from phi35.training.config import TrainingConfig
from phi35.training.curves import plot
from phi35.training.data_opening import open_data, open_held_out
from phi35.training.description import describe_run, versions
from phi35.training.engine import Engine
from phi35.training.environment import Environment
from phi35.training.evaluation import Evaluator, check_evaluation
from phi35.training.export import export
from phi35.training.loop import run_steps
from phi35.training.metrics import Metrics
from phi35.training.optimizers import check_optimizer
from phi35.training.preference_config import PreferenceConfig
from phi35.training.random_state import seed_everything
from phi35.training.reporting import open_metrics
from phi35.training.sequence import check_heads
from phi35.training.shared_folder import check_shared
from phi35.training.trackers import choose_trackers
from phi35.training.watchdog import Watchdog


@dataclass(frozen=True)
class RunSummary:
    """What a run did and where it wrote.

    Attributes:
        config: resolved config.
        first_loss: loss of the first step in the metrics.
        last_loss: loss of the last step.
        seconds_per_step: mean over the last half of the steps.
        written: what was written, by description.
        history: lines of ``metrics.jsonl`` (on rank 0).
    """

    config: TrainingConfig
    first_loss: float
    last_loss: float
    seconds_per_step: float
    written: dict[str, str]
    history: list[dict[str, Any]]


def train(
    config: TrainingConfig, deepspeed_file: dict[str, Any] | None = None, device: str | None = None
) -> RunSummary | None:
    """Trains as the config says, from the newest checkpoint of its output folder where there is one.

    Args:
        config: what to do.
        deepspeed_file: additions from a ready DeepSpeed JSON file.
        device: "cpu" or "cuda"; by default CUDA where there is a device.

    Returns:
        The summary on rank 0, None on the others.

    Raises:
        ValueError: for anything in the config that cannot be done, before memory is allocated where it can be seen.
        RunStopped: if a signal or the death of the launcher ended the run; a checkpoint is saved.
        SaveError: if the last checkpoint could not be written.
        RunDiverged: if too many updates in a row were left out, or rollbacks did not help.
    """
    model_config = read_model_config(config)
    timeout = {"timeout_seconds": config.hang_timeout_seconds + 60} if config.hang_timeout_seconds else {}
    place = environment.start(device, **timeout)
    config = config.resolve(
        world_size=place.world_size,
        num_experts=model_config.num_local_experts,
        router_aux_loss_coef=model_config.router_aux_loss_coef,
    )
    choose_trackers(config.trackers)
    check_optimizer(config)
    check_heads(config, model_config)
    check_evaluation(config, model_config)
    _check_adapter(config, model_config)
    with Watchdog(place, Path(config.output_dir), config.hang_timeout_seconds) as watchdog:
        return _run(config, model_config, place, deepspeed_file, watchdog)


def _run(
    config: TrainingConfig,
    model_config: ModelConfig,
    place: Environment,
    deepspeed_file: dict[str, Any] | None,
    watchdog: Watchdog,
) -> RunSummary | None:
    """The run itself, once its config is known to be one."""
    folder = Path(config.output_dir)
    check_shared(folder, place)
    reader = checkpoint.open_newest(folder / "checkpoints", place) if config.resume else None
    if reader is not None:
        _check_resumable(reader, config, model_config)
    _open_output(folder, config, place)
    processor = build_processor(config, model_config)
    source = open_data(config, model_config, processor, place, folder)
    held_out = open_held_out(config, model_config, processor, place, folder) if config.eval_interval else None
    model = build_model(config, model_config, reader, place.device)
    engine = Engine(model, config, place, deepspeed_file)
    first_step = _restore(engine, source, reader)
    if config.preference is not None:
        _learn_preferences(engine, [one for one in (source, held_out) if one is not None], folder, first_step)
    if place.is_main and not config.resume:
        set_aside(folder / "checkpoints")
    metrics = open_metrics(engine, model_config, source, folder, first_step)
    state = {
        "training_config": config.to_dict(),
        "model_config": checkpoint.model_config_to_dict(model_config),
        "versions": versions(),
    }
    evaluator = None
    if held_out is not None:
        questions = {"processor": processor, "num_questions": config.eval_questions}
        evaluator = Evaluator(engine, held_out, config.eval_samples, **questions)
    saved = reader.trainer if reader is not None else {}
    states = {"health_state": saved.get("health"), "best_state": saved.get("best")}
    root = folder / "checkpoints"
    last = run_steps(engine, source, metrics, first_step, root, state, watchdog, evaluator=evaluator, **states)
    metrics.close()
    summary = _finish(config, processor, metrics, folder, last) if place.is_main else None
    place.wait_for_main()
    return summary


def _open_output(folder: Path, config: TrainingConfig, place: Environment) -> None:
    """Describes the run in its folder; every rank learns where that is impossible."""
    problem = None
    if place.is_main:
        try:
            describe_run(folder, config, place)
        except OSError as error:
            problem = f"output_dir {config.output_dir!r} cannot be written ({error}); give another"
    problem = place.broadcast(problem)
    if problem is not None:
        raise ValueError(problem)


def _restore(engine: Engine, source: Any, reader: CheckpointReader | None) -> int:
    """Puts optimizer, data and random state where the checkpoint left them; returns the updates made."""
    config, place = engine.config, engine.environment
    if reader is None:
        seed_everything(config.seed, place.rank)
        return 0
    checkpoint.load_optimizer(engine, reader)
    engine.balancer.load_state(reader.trainer.get("selection_bias"), place.device)
    source.load_state_dict(reader.trainer["data"])
    checkpoint.load_random_state(reader, place, config.seed)
    return int(reader.trainer["step"])


def _check_adapter(config: TrainingConfig, model_config: ModelConfig) -> None:
    """Checks an adapter against the model, before anything is allocated.

    Raises:
        ValueError: if it cannot be trained there, or weights in few bits are to be trained without one.
    """
    if config.adapter is None:
        if model_config.quantization is not None:
            raise ValueError(
                f"the weights of {config.model!r} are in few bits ({model_config.quantization.label}) and cannot be "
                "trained themselves: set adapter"
            )
        return
    places = AdapterConfig.of(config.adapter).resolve(model_config)
    if "router" in places and config.zero_stage == 3:
        raise ValueError("an adapter of the router needs whole weights on each rank: set zero_stage 0 to 2")
    if config.export_merged:
        check_mergeable(model_config)


def _check_resumable(reader: CheckpointReader, config: TrainingConfig, model_config: ModelConfig) -> None:
    saved = checkpoint.model_config_from_dict(reader.trainer["model_config"])
    if saved != model_config:
        raise ValueError(
            f"{config.output_dir!r} holds checkpoints of another model; give another output_dir, or resume=false "
            "to overwrite them"
        )
    if int(reader.trainer["step"]) > config.max_steps:
        raise ValueError(
            f"{str(reader.folder)!r} is beyond max_steps={config.max_steps}; give more steps or another output_dir"
        )
    adapter = reader.trainer["training_config"].get("adapter")
    if _adapter_of(adapter) != _adapter_of(config.adapter):
        raise ValueError(
            f"{str(reader.folder)!r} holds adapter={adapter}, this run has {config.adapter}: keep it, or give another "
            "output_dir"
        )
    optimizer = reader.trainer["training_config"].get("optimizer", "adamw")
    moments_differ = "muon" in (optimizer, config.optimizer)
    if optimizer != config.optimizer and moments_differ:
        raise ValueError(
            f"{str(reader.folder)!r} holds the moments of optimizer {optimizer!r}, this run has {config.optimizer!r}: "
            "keep it, or start a new run from the exported model (scripts/export_checkpoint.py)"
        )


def _learn_preferences(engine: Engine, sources: list[Any], folder: Path, first_step: int) -> None:
    """Makes the engine minimise the loss of pairs, and finds their reference."""
    assert engine.config.preference is not None
    preference = PreferenceConfig.of(engine.config.preference)
    reference = preference.reference_for(engine.config.adapter is not None)
    engine.objective = resolve("phi35.training.preference:PreferenceObjective")(preference, reference)
    if reference == "precomputed":
        resolve("phi35.training.reference:attach_reference")(engine, sources, folder, first_step)


def _adapter_of(values: dict[str, Any] | None) -> AdapterConfig | None:
    return None if values is None else AdapterConfig.of(values)


def _finish(config: TrainingConfig, processor: Any, metrics: Metrics, folder: Path, last: Path) -> RunSummary:
    history = metrics.history
    written = {"config": folder / "training_config.yaml", "metrics": metrics.path, "checkpoint": last}
    if history:
        written["curves"] = folder / "curves.png"
        plot(history, written["curves"], metrics.evaluations)
    if metrics.heat_map_path.is_file():
        written["experts"] = metrics.heat_map_path
    if config.export:
        options = {"processor": processor, "verify": False, "average": config.export_average}
        if config.adapter is None or config.export_merged:
            written["model"] = folder / "model"
            export(last, written["model"], merged=config.export_merged, **options)
        if config.adapter is not None:
            written["adapter"] = folder / "adapter"
            export(last, written["adapter"], **options)
    losses = [line["loss"] for line in history if line["loss"] is not None] or [float("nan")]
    later = history[len(history) // 2 :]
    summary = RunSummary(
        config=config,
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds_per_step=sum(line["seconds"] for line in later) / max(1, len(later)),
        written={name: str(path) for name, path in written.items()},
        history=history,
    )
    print(f"loss {summary.first_loss:.4f} -> {summary.last_loss:.4f} in {config.max_steps} steps", end="")
    print(f", {summary.seconds_per_step * 1000:.0f} ms a step")
    for name, path in summary.written.items():
        print(f"  {name:<11} {path}", flush=True)
    return summary
