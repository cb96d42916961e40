"""The embedding slot of a vision model: pictures become embeddings in the places of their tags.

Follows the published ``Phi3ImageEmbedding`` (HD transform, learnable separators, order "sub_glb"). It departs
where that is wrong or narrow: features follow their tag's number, tags may repeat, batches may mix prompts with
different numbers of images, and only real crops run through the tower.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from phi35.config import ModelConfig
from vision.image_transform import num_image_tokens, tile_grid
from vision.placement import Placement, count_images, place_features
from vision.projector import ImageProjection, end_rows, join_tiles, merge_patches
from vision.tower import ClipVisionTower
from vision.tower_graphs import TowerGraphs


class VisionEmbedding(nn.Module):
    """Tower, separators and projection, and the scatter into the token embeddings.

    Args:
        config: a model config whose ``vision`` is set.

    Attributes:
        run_tower_always: whether a call without images still runs the tower, on one dummy crop whose features
            count nothing. None (the default) does so in training mode: when ranks train together, each must make
            the same calls, whether its share of the batch has images or not. Set True to evaluate under ZeRO-3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vision is None:
            raise ValueError("VisionEmbedding needs a config with vision set, e.g. the preset 'phi-3.5-vision'")
        self.config = config.vision
        width = 4 * config.vision.hidden_size
        self.glb_GN = nn.Parameter(torch.empty(1, 1, width))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, width))
        for separator in (self.glb_GN, self.sub_GN):
            nn.init.normal_(separator, std=config.initializer_range)
        self.img_projection = ImageProjection(config)
        self.img_processor = ClipVisionTower(config.vision)
        self.run_tower_always: bool | None = None
        self._graphs = TowerGraphs()
        self._from_graphs = False

    @property
    def unused_parameter_names(self) -> tuple[str, ...]:
        """Parameters that the features do not depend on (the tower's last block and final norm)."""
        return tuple(f"img_processor.{name}" for name in self.img_processor.unused_parameter_names)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each block of the tower is recomputed in the backward pass."""
        return self.img_processor.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.img_processor.gradient_checkpointing = enabled

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        image_features: Sequence[Tensor] | None = None,
        num_images: list[int] | None = None,
        placement: Placement | None = None,
    ) -> Tensor:
        """Token embeddings with the images' features in the places of their tags.

        Args:
            input_ids: (B, T) int64; -i stands for image i of the row, or the image token id for its images in
                order (where no id is negative and images are given; without images it is an ordinary token).
            inputs_embeds: (B, T, D) embeddings of the ids; what they hold at placeholders does not matter.
            pixel_values: (C, 3, S, S) real crops of all images, row after row, each global view first.
            image_sizes: (N, 2) height and width of each image after padding.
            image_features: features (tokens_i, D) of all images in place of ``pixel_values``, as ``features``
                returns them.
            num_images: images of each row, where the tags do not tell (see ``vision.placement``).
            placement: of these ids and images, as ``place`` gives it; None finds it.

        Returns:
            (B, T, D), a new tensor where images came, differentiable in all of tower, separators and projection.

        Raises:
            ValueError: if placeholders, images, sizes and crops do not match; the message names both counts.
        """
        if pixel_values is not None and pixel_values.shape[0] == 0:
            pixel_values = None
        grids: list[tuple[int, int]] = []
        if image_features is None and pixel_values is not None:
            grids = self._grids(image_sizes, pixel_values)
        elif pixel_values is not None:
            raise ValueError("give either pixel_values or image_features, not both")
        elif image_features is None and image_sizes is not None and len(image_sizes):
            raise ValueError(
                f"image_sizes of {len(image_sizes)} images came without pixel_values: give both or neither"
            )
        if not grids and not image_features:
            self._check_no_placeholders(input_ids)
            always = self.training if self.run_tower_always is None else self.run_tower_always
            return inputs_embeds + self._nothing().to(inputs_embeds.dtype) if always else inputs_embeds
        num_tokens = self._num_tokens(grids) if image_features is None else [len(each) for each in image_features]
        # Before the tower's work is queued: whatever reads the ids on the host would wait for it to end.
        if placement is None:
            placement = place_features(input_ids, num_tokens, self.config.image_token_id, num_images)
        if image_features is None:
            assert pixel_values is not None
            features = self._features(pixel_values, grids)
        else:
            features = torch.cat(list(image_features))
        values = features.to(inputs_embeds)[placement.feature_indices]
        return inputs_embeds.index_put((placement.rows, placement.columns), values)

    def features(self, pixel_values: Tensor, image_sizes: Tensor | Sequence[Sequence[int]] | None) -> list[Tensor]:
        """What the decoder reads of each image: tile rows, the separator of views, rows of the global view.

        Args:
            pixel_values: (C, 3, S, S) real crops of all images, each global view first.
            image_sizes: (N, 2) height and width of each image after padding.

        Returns:
            N tensors (tokens_i, D).

        Raises:
            ValueError: if the sizes are no multiples of the tile side, or need another number of crops than came.
        """
        grids = self._grids(image_sizes, pixel_values)
        return list(self._features(pixel_values, grids).split(self._num_tokens(grids)))

    def place(
        self, input_ids: Tensor, pixel_values: Tensor, image_sizes: Tensor | Sequence[Sequence[int]] | None
    ) -> Placement:
        """Where the features of images go, for callers that must ask before the tower's work is queued.

        Arguments are those of ``forward``.

        Raises:
            ValueError: if placeholders, images, sizes and crops do not match.
        """
        grids = self._grids(image_sizes, pixel_values)
        return place_features(input_ids, self._num_tokens(grids), self.config.image_token_id)

    @contextlib.contextmanager
    def tower_from_graphs(self, wanted: bool = True) -> Iterator[None]:
        """Within it the tower runs from CUDA graphs where ``vision.tower_graphs`` can; no gradients come from them."""
        before, self._from_graphs = self._from_graphs, wanted
        try:
            yield
        finally:
            self._from_graphs = before

    def crops_per_image(self, image_sizes: Tensor | Sequence[Sequence[int]] | None, pixel_values: Tensor) -> list[int]:
        """How many of the crops (C, 3, S, S) are each image's.

        Raises:
            ValueError: as of ``features``.
        """
        return [1 + rows * columns for rows, columns in self._grids(image_sizes, pixel_values)]

    def crops_of_images(self, image_sizes: Tensor | Sequence[Sequence[int]]) -> list[int]:
        """How many crops each image has, its global view included: N numbers from sizes (N, 2) after padding.

        Raises:
            ValueError: if a size is no multiple of the tile side.
        """
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        grids = [tile_grid(int(height), int(width), self.config) for height, width in sizes]
        return [1 + rows * columns for rows, columns in grids]

    def images_of_rows(self, input_ids: Tensor, image_sizes: Tensor) -> list[list[int]]:
        """Which images of the batch each row owns, by their tags or by the places its image tokens take.

        Args:
            input_ids: (B, T) int64, -i or the image token id where features go.
            image_sizes: (N, 2) heights and widths after padding.

        Raises:
            ValueError: if placeholders and images do not match.
        """
        grids = [tile_grid(int(height), int(width), self.config) for height, width in image_sizes.tolist()]
        counts = count_images(input_ids, self._num_tokens(grids), self.config.image_token_id)
        ends = list(accumulate(counts))
        return [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]

    def _features(self, pixel_values: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(tokens, D) of all images, one after the other."""
        first_crop = list(accumulate((1 + rows * columns for rows, columns in grids), initial=0))
        by_grid: dict[tuple[int, int], list[int]] = {}
        for image, grid in enumerate(grids):
            by_grid.setdefault(grid, []).append(image)
        # Before the tower's work is queued, which a copy from the host would wait for.
        starts = [
            torch.tensor([first_crop[image] for image in images], device=pixel_values.device)
            for images in by_grid.values()
        ]
        graphs = self._from_graphs and not torch.is_grad_enabled()
        patches = self._graphs(self.img_processor, pixel_values) if graphs else self.img_processor(pixel_values)
        merged = merge_patches(patches)
        pieces = [
            self._sequences(merged, grid, first).flatten(0, 1) for grid, first in zip(by_grid, starts, strict=True)
        ]
        # one call for all: each rank of a sharded model then makes the same calls, whatever its images
        projected = self.img_projection(torch.cat(pieces))
        if len(by_grid) == 1:
            return projected
        order = [image for images in by_grid.values() for image in images]
        num_tokens = self._num_tokens(grids)
        by_image = dict(zip(order, projected.split([num_tokens[image] for image in order]), strict=True))
        return torch.cat([by_image[image] for image in range(len(grids))])

    def _num_tokens(self, grids: list[tuple[int, int]]) -> list[int]:
        side = self.config.image_size
        known = {grid: num_image_tokens(grid[0] * side, grid[1] * side, self.config) for grid in set(grids)}
        return [known[grid] for grid in grids]

    def _sequences(self, merged: Tensor, grid: tuple[int, int], starts: Tensor) -> Tensor:
        """(N, tokens, 4 W) of the images of one grid, whose global views stand at ``starts`` (N,) of ``merged``."""
        num_tiles = grid[0] * grid[1]
        tiles = merged[(starts[:, None] + torch.arange(1, 1 + num_tiles, device=merged.device)).flatten()]
        views = self.glb_GN.to(merged.dtype).expand(len(starts), 1, -1)
        tile_rows = end_rows(join_tiles(tiles, grid), self.sub_GN)
        return torch.cat([tile_rows, views, end_rows(merged[starts], self.sub_GN)], dim=1)

    def _grids(
        self, image_sizes: Tensor | Sequence[Sequence[int]] | None, pixel_values: Tensor
    ) -> list[tuple[int, int]]:
        """(rows, columns) of each image's tiles, checked against the crops that came."""
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        if not sizes or not all(isinstance(size, Sequence) and len(size) == 2 for size in sizes):
            raise ValueError(
                f"pixel_values need image_sizes (N, 2), heights and widths after padding; got {image_sizes}"
            )
        grids = [tile_grid(int(height), int(width), self.config) for height, width in sizes]
        crops_per_image = [1 + rows * columns for rows, columns in grids]
        if pixel_values.dim() != 4 or pixel_values.shape[0] != sum(crops_per_image):
            raise ValueError(
                f"image_sizes of {len(grids)} images need {sum(crops_per_image)} crops ({crops_per_image}, a global "
                f"view and the tiles of each), but pixel_values have shape {tuple(pixel_values.shape)}"
            )
        return grids

    def _check_no_placeholders(self, input_ids: Tensor) -> None:
        side = self.config.image_size
        smallest_image = num_image_tokens(side, side, self.config)
        tagged = int((input_ids < 0).sum())
        # A model may write a stray image token id as text; as many of them as a picture takes are its place.
        in_order = int((input_ids == self.config.image_token_id).sum(dim=1).max()) if input_ids.numel() else 0
        if tagged or in_order >= smallest_image:
            raise ValueError(
                f"input_ids hold {tagged or in_order} image placeholders, but 0 images came: give pixel_values and "
                "image_sizes, or take the image tags out of the prompt"
            )

    def _nothing(self) -> Tensor:
        """A zero that depends on every used parameter: the features of one blank crop, times zero.

        The crop stands for the global view and the one tile of a picture and takes the pictures' way, so that
        gradients become ready in the same order as theirs: ZeRO-2 flattens them in that order, and where ranks
        disagree about it, it adds up gradients of different parameters.
        """
        side = self.config.image_size
        merged = merge_patches(self.img_processor(self.glb_GN.new_zeros(1, 3, side, side)))
        first = torch.zeros(1, dtype=torch.int64, device=merged.device)
        tokens = self._sequences(merged.expand(2, -1, -1, -1), (1, 1), first)
        return self.img_projection(tokens.flatten(0, 1)).sum() * 0
