"""Log-probabilities of preference pairs under the model as it is before the first step, kept in the run's folder."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed

from phi35.data.preferences import PreferenceSource
from phi35.training.acceleration import fast_attention
from phi35.training.engine import Engine

FILE = "reference_log_probs.safetensors"


def attach_reference(engine: Engine, sources: list[PreferenceSource], folder: Path, first_step: int) -> Path:
    """Gives sources the reference's log-probabilities of their pairs, computed where the folder does not hold them.

    All ranks call it alike, before the first batch is drawn.

    Args:
        engine: with a ``PreferenceObjective`` and the weights of ``first_step``.
        sources: of the same pairs.
        folder: of the run.
        first_step: updates made before.

    Returns:
        The file.

    Raises:
        ValueError: if the run goes on after updates and the file is missing, or is of other pairs.
    """
    pairs, path, place = sources[0].pairs, folder / FILE, engine.environment
    known = place.broadcast(_read(path, pairs.identity) if place.is_main else None)
    if known is None:
        if first_step:
            raise ValueError(
                f"{str(path)!r} is missing or of other pairs, and the weights have moved since the first step: put it "
                "back, or begin anew (resume=false)"
            )
        known = _compute(engine, sources[0])
        if place.is_main:
            from safetensors.torch import save_file

            save_file({"log_probs": known}, path, metadata={"pairs": pairs.identity})
        place.wait_for_main()
    for source in sources:
        if source.pairs.identity != pairs.identity:
            raise ValueError("held-out pairs of other data need reference 'adapter' or 'none': leave eval_data out")
        source.pairs.reference = known
    return path


def _read(path: Path, identity: str) -> torch.Tensor | None:
    from safetensors import safe_open

    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as opened:
        if (opened.metadata() or {}).get("pairs") != identity:
            return None
        return opened.get_tensor("log_probs")


def _compute(engine: Engine, source: PreferenceSource) -> torch.Tensor:
    """(n, 2) float32; pairs that fit no row have zeros, for no row asks for them."""
    place, objective, device = engine.environment, engine.objective, engine.environment.device
    total = torch.zeros(len(source.pairs), 2, dtype=torch.float64, device=device)
    rows = _plan(source)
    share = rows[place.rank :: place.world_size]
    passes = -(-len(rows) // place.world_size)
    for number in range(passes):  # as many on every rank: under ZeRO-3 all of them gather weights for each
        row = share[number] if number < len(share) else rows[0]
        batch: dict[str, Any] = source.rows.batch([row])  # type: ignore[attr-defined]
        host = {name: batch[name] for name in ("sequence_lengths", "image_sizes") if name in batch}
        moved = {name: value.to(device) for name, value in batch.items()} | host
        with fast_attention(device):
            found = objective.log_probs(engine.model, moved).unflatten(1, (-1, 2))[0]
        if number < len(share):
            total[row] = found[: len(row)].double()
    if place.world_size > 1:
        distributed.all_reduce(total)
    return total.float().cpu()


def _plan(source: PreferenceSource) -> list[list[int]]:
    """Every pair that fits a row once, in rows."""
    length, room = source.rows.length, 0
    rows: list[list[int]] = []
    for number, count in enumerate(source.pairs.lengths.sum(axis=1).tolist()):
        if count > length:
            continue
        if count > room:
            rows.append([])
            room = length
        rows[-1].append(number)
        room -= count
    return rows
