"""Which feature goes to which position of a batch of prompts.

Placeholders come in two kinds. An id -i stands for image i of its row (i counts from 1): tags may come in any
order and may repeat, and a run of -i holds the image's features a whole number of times. Where no id of the batch
is negative, the image token id stands for the row's images in their order. The published code splices features in
the order of the list whatever the tags say; this one follows the tags.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Where features go.

    Attributes:
        rows: (P,) int64 row of each placeholder.
        columns: (P,) int64 column of each placeholder.
        feature_indices: (P,) int64 into the features of all images, one after the other.
    """

    rows: Tensor
    columns: Tensor
    feature_indices: Tensor


@dataclass(frozen=True)
class _Run:
    """Equal placeholders side by side."""

    row: int
    token_id: int
    length: int


def place_features(
    input_ids: Tensor, num_tokens: list[int], image_token_id: int, num_images: list[int] | None = None
) -> Placement:
    """Finds the placeholders of a batch and the feature that belongs to each.

    Args:
        input_ids: (B, T) int64.
        num_tokens: how many features each image of the batch has, the rows' images one after the other.
        image_token_id: placeholder used where no id is negative.
        num_images: how many images each row owns. By default row b owns as many as its highest tag says, or as
            many as its image token ids take up; rows whose last images have no tag need it.

    Raises:
        ValueError: if placeholders and images do not match, with both counts.
    """
    device, input_ids = input_ids.device, input_ids.cpu()  # one copy; what follows asks for values all the time
    negative = input_ids < 0
    tagged = bool(negative.any())
    rows, columns = (negative if tagged else input_ids == image_token_id).nonzero(as_tuple=True)
    run_starts, run_indices = _runs(rows, columns, input_ids[rows, columns])
    runs = _described(run_starts, rows, columns, input_ids)
    if num_images is not None:
        _check_ownership(num_images, input_ids.shape[0], len(num_tokens))
    if tagged:
        images = _images_by_tag(runs, num_tokens, input_ids.shape[0], num_images)
        periods = [num_tokens[image] for image in images]
    else:
        images = _images_in_order(runs, num_tokens, num_images)
        periods = [run.length for run in runs]
    first_feature = [0]
    for count in num_tokens:
        first_feature.append(first_feature[-1] + count)
    starts = torch.tensor([first_feature[image] for image in images], dtype=torch.int64)
    period = torch.tensor(periods, dtype=torch.int64)
    position_in_run = torch.arange(len(rows)) - run_starts[run_indices]
    feature_indices = starts[run_indices] + position_in_run % period[run_indices]
    return Placement(*torch.stack([rows, columns, feature_indices]).to(device))


def count_images(input_ids: Tensor, num_tokens: list[int], image_token_id: int) -> list[int]:
    """How many images each row owns: as many as its highest tag says, or as its image token ids take up.

    Args:
        input_ids: (B, T) int64.
        num_tokens: how many features each image of the batch has, the rows' images one after the other.
        image_token_id: placeholder used where no id is negative.

    Raises:
        ValueError: if the rows own more or fewer images than there are, or a row's places end within an image.
    """
    if bool((input_ids < 0).any()):
        counts = (-input_ids.amin(dim=1)).clamp(min=0).tolist()
    else:
        counts, left = [], list(num_tokens)
        for places in (input_ids == image_token_id).sum(dim=1).tolist():
            before = len(left)
            while places > 0 and left:
                places -= left.pop(0)
            if places:
                raise ValueError(
                    "the image tokens of a row end within an image, or there are more than the images take"
                )
            counts.append(before - len(left))
    if sum(counts) != len(num_tokens):
        raise ValueError(f"the placeholders in input_ids ask for {sum(counts)} images, but {len(num_tokens)} came")
    return counts


def _runs(rows: Tensor, columns: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first placeholder of each run (R,), and the run of each placeholder (P,)."""
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = (rows.diff() != 0) | (columns.diff() != 1) | (token_ids.diff() != 0)
    return begins.nonzero().flatten(), begins.cumsum(0) - 1


def _described(run_starts: Tensor, rows: Tensor, columns: Tensor, input_ids: Tensor) -> list[_Run]:
    lengths = torch.diff(run_starts, append=run_starts.new_tensor([len(rows)]))
    first_rows = rows[run_starts]
    token_ids = input_ids[first_rows, columns[run_starts]]
    table = torch.stack([first_rows, token_ids, lengths], dim=1).tolist()
    return [_Run(*entries) for entries in table]


def _check_ownership(num_images: list[int], num_rows: int, total: int) -> None:
    if len(num_images) != num_rows or min(num_images, default=0) < 0:
        raise ValueError(f"num_images must hold one count for each of the {num_rows} rows, got {num_images}")
    if sum(num_images) != total:
        raise ValueError(f"num_images {num_images} adds up to {sum(num_images)} images, but {total} came")


def _images_by_tag(runs: list[_Run], num_tokens: list[int], num_rows: int, num_images: list[int] | None) -> list[int]:
    """Index into the batch's images for each run."""
    highest = [0] * num_rows
    for run in runs:
        highest[run.row] = max(highest[run.row], -run.token_id)
    if num_images is None:
        if sum(highest) != len(num_tokens):
            raise ValueError(
                f"the tags in input_ids ask for {sum(highest)} images (highest tag of each row: {highest}), but "
                f"{len(num_tokens)} came: give each row its images, in order, or say how many it owns with num_images"
            )
        num_images = highest
    first_image = [0, *accumulate(num_images)]
    for row, (tag, owned) in enumerate(zip(highest, num_images, strict=True)):
        if tag > owned:
            raise ValueError(f"row {row} uses image tag {tag} but has {owned} images: give the image or drop the tag")
    images = []
    for run in runs:
        image = first_image[run.row] - run.token_id - 1
        if run.length % num_tokens[image]:
            raise ValueError(
                f"row {run.row} has {run.length} placeholders of id {run.token_id} in a run, but its image "
                f"{-run.token_id} has {num_tokens[image]} features: a run must hold a whole number of images"
            )
        images.append(image)
    return images


def _images_in_order(runs: list[_Run], num_tokens: list[int], num_images: list[int] | None) -> list[int]:
    """Index of the first image of each run; a run may hold several images side by side."""
    first_images = []
    image, limit, row = 0, len(num_tokens), -1
    for run in runs:
        if num_images is not None and run.row != row:
            image = sum(num_images[: run.row])
            limit = image + num_images[run.row]
        row = run.row
        first_images.append(image)
        remaining = run.length
        while remaining > 0:
            if image == limit or remaining < num_tokens[image]:
                features = sum(num_tokens[first_images[-1] : limit])
                raise ValueError(
                    f"row {run.row} has a run of {run.length} image placeholders, which is not a whole number of the "
                    f"images left for it ({limit - first_images[-1]}, with {features} features): num_tokens of these "
                    f"images are {num_tokens[first_images[-1] : limit]}"
                )
            remaining -= num_tokens[image]
            image += 1
    if num_images is None and image != len(num_tokens):
        raise ValueError(
            f"the placeholders in input_ids take up {image} images, but {len(num_tokens)} came: the prompt lacks "
            "placeholders, or say how many images each row owns with num_images"
        )
    return first_images
