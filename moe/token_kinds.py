"""Which experts image tokens and text tokens go to, in a model that fills both slots.

Counted from what the layers return; the picture is drawn with matplotlib, if that is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe.losses import expert_counts
from phi35.outputs import RouterOutput


@dataclass(frozen=True)
class KindCounts:
    """Choices of experts by kind of token; counts of several batches add up.

    Attributes:
        image: (L, E) float32, choices of tokens that stand for image features, one row a sparse layer.
        text: (L, E) float32, choices of all other tokens.
    """

    image: torch.Tensor
    text: torch.Tensor

    def __add__(self, other: "KindCounts") -> "KindCounts":
        return KindCounts(self.image + other.image, self.text + other.text)

    def shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each expert's share of its layer's choices, (L, E), of image tokens and of text tokens.

        Raises:
            ValueError: if no token of a kind was counted.
        """
        for kind in ("image", "text"):
            if not bool((getattr(self, kind).sum(dim=1) > 0).all()):
                raise ValueError(f"no {kind} token was counted: give batches with pictures and with text")
        return self.image / self.image.sum(1, keepdim=True), self.text / self.text.sum(1, keepdim=True)

    def separation(self) -> torch.Tensor:
        """(L,) total variation distance of the two shares: 0 where both kinds use experts alike, 1 where no expert
        serves both."""
        image, text = self.shares()
        return 0.5 * (image - text).abs().sum(dim=1)


@torch.no_grad()
def count_by_kind(
    router_outputs: Sequence[RouterOutput], input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> KindCounts:
    """Counts one batch.

    Args:
        router_outputs: one per sparse layer, of the whole batch.
        input_ids: (B, T) int64; negative ids stand for image features.
        attention_mask: (B, T), 1 for real tokens; padding is left out.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    image = (input_ids < 0) & real
    return KindCounts(expert_counts(router_outputs, image), expert_counts(router_outputs, real & ~image))


def plot_by_kind(counts: KindCounts, path: str | Path, title: str = "") -> None:
    """Draw, layer by layer, how image tokens and text tokens spread over the experts.

    Args:
        counts: of some batches.
        path: picture to write; its folder is made.
        title: over the picture.
    """
    from matplotlib.figure import Figure

    image, text = (shares.cpu().numpy() for shares in counts.shares())
    separation = counts.separation().tolist()
    num_layers, num_experts = image.shape
    figure = Figure(figsize=(3.2 + 0.75 * num_experts, 1.6 + 0.42 * num_layers), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    top = float(max(image.max(), text.max()))
    for axes, shares, name in ((left, image, "image tokens"), (right, text, "text tokens")):
        drawn = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("expert")
        axes.set_xticks(range(num_experts))
        for layer in range(num_layers):
            for expert in range(num_experts):
                share = float(shares[layer, expert])
                color = "black" if share > 0.6 * top else "white"
                axes.text(expert, layer, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    left.set_ylabel("layer")
    left.set_yticks(
        range(num_layers), [f"{layer}\n({separation[layer]:.2f})" for layer in range(num_layers)], fontsize=8
    )
    bar = figure.colorbar(drawn, ax=[left, right], shrink=0.9)
    bar.set_label("share of the layer's choices")
    figure.suptitle(f"{title}\n(distance of the two kinds under each layer's number)" if title else "", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
