"""Short training runs in processes of their own, on a little text: their losses to the bit, and their checkpoints."""

from pathlib import Path

from phi35.training.checkpoint_files import CheckpointReader


def text_files(folder):
    """A folder of four small files of text; made where it is missing."""
    folder = Path(folder) / "text"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        lines = [f"value_{number}_{line} = compute({line * 7 % 13})" for line in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines))
    return str(folder)


def settings(text_folder, output, **changes):
    """Fields of a config of six steps with a checkpoint after three."""
    base = {
        "model": "tiny-phi-3.5-mini",
        "data": text_folder,
        "sequence_length": 16,
        "global_batch_size": 4,
        "max_steps": 6,
        "warmup_steps": 2,
        "adam_epsilon": 1e-4,
        "output_dir": str(output),
        "export": False,
        "keep_last": 0,
        "save_interval": 3,
        "trackers": [],
    }
    return {**base, **changes}


def train_and_read(rank, world_size, values):
    """Losses as hex by step, of a run in this process."""
    from phi35.training.config import TrainingConfig
    from phi35.training.run import train

    summary = train(TrainingConfig(**values), device="cpu")
    return None if summary is None else {line["step"]: line["loss"].hex() for line in summary.history}


def tensors_of(folder):
    """All tensors of a checkpoint by (kind, name)."""
    reader = CheckpointReader(folder)
    return {(kind, name): reader.read(kind, name) for kind, name in reader._pieces}
