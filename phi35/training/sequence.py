"""Rows shared by processes in a training run: who shares, and each one's part of a batch.

Neighbouring ranks share rows: ranks [g s, (g + 1) s) form group g, which reads one micro-batch and takes a stretch of
T / s tokens each. For the optimizer, ZeRO and the experts they are ranks like any other, with fewer tokens.
"""

from typing import Any

import torch
from torch import distributed
from torch.nn import functional as F

from phi35.config import ModelConfig
from phi35.language_model_head import IGNORED_LABEL, shift_labels
from phi35.packed_attention import ignore_first_tokens
from phi35.sequence_parallel import SequenceParallel, kv_copies
from phi35.training.config import TrainingConfig
from phi35.training.environment import Environment


def check_heads(config: TrainingConfig, model_config: ModelConfig) -> None:
    """Raises ValueError where the model's heads cannot be spread over ``sequence_parallel_size`` processes."""
    kv_copies(model_config.num_attention_heads, model_config.num_key_value_heads, config.sequence_parallel_size)


def share_rows(model: Any, config: TrainingConfig, place: Environment) -> SequenceParallel | None:
    """Makes the groups and tells the model of this rank's; all ranks call it. None where nothing is shared."""
    size = config.sequence_parallel_size
    if size == 1:
        return None
    groups: list[Any] = [
        distributed.new_group(list(range(first, first + size))) for first in range(0, place.world_size, size)
    ]
    shared = SequenceParallel(groups[place.rank // size])
    model.model.sequence_parallel = shared
    return shared


def local_part(
    batch: dict[str, torch.Tensor], shared: SequenceParallel, model_config: ModelConfig
) -> dict[str, torch.Tensor]:
    """This rank's stretch of a micro-batch, on the host.

    Args:
        batch: with ``input_ids`` and ``labels`` (B, T), and ``sequence_lengths`` or an ``attention_mask`` padded on
            the right.
        shared: the ranks that have the same batch.
        model_config: a model with vision keeps the whole ``input_ids``, in which its pictures find their place.

    Returns:
        ``targets`` in place of ``labels``, moved before the cut, so that a stretch's last token predicts the next
        stretch's first; ``sequence_lengths`` of the whole rows; everything else as it was.

    Raises:
        ValueError: for padding on the left.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask, lengths = batch.get("attention_mask"), batch.get("sequence_lengths")
    if lengths is None:
        lengths = _row_lengths(mask, ids)
    padding = -ids.shape[1] % shared.size
    if mask is None and padding:
        mask = torch.ones_like(ids)
    targets = shift_labels(ignore_first_tokens(labels, lengths))
    ids, targets = F.pad(ids, (0, padding)), F.pad(targets, (0, padding), value=IGNORED_LABEL)
    part = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    part |= {
        "input_ids": ids if model_config.vision is not None else shared.local(ids),
        "targets": shared.local(targets),
        "sequence_lengths": lengths,
    }
    if mask is not None:
        part["attention_mask"] = shared.local(F.pad(mask, (0, padding)))
    return part


def _row_lengths(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """(B, 1) real tokens of each row."""
    if mask is None:
        return torch.full((ids.shape[0], 1), ids.shape[1])
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("rows that processes share are padded on the right; this batch has padding before tokens")
    return mask.sum(dim=1, keepdim=True).long()
