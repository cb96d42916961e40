"""``phi35 upcycle``: a dense checkpoint turned into a sparse one."""

from pathlib import Path
from typing import Annotated

import typer


def upcycle(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a dense checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    experts: Annotated[int, typer.Option(help="Experts per sparse layer.")] = 16,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    router_type: Annotated[str, typer.Option(help="topk or sparsemixer.")] = "topk",
    norm_topk_prob: Annotated[bool, typer.Option(help="Make each token's weights sum to one (topk).")] = True,
    router_init: Annotated[str, typer.Option(help="normal or zeros.")] = "normal",
    router_std: Annotated[float, typer.Option(help="Standard deviation of normal routers.")] = 0.02,
    noise: Annotated[float, typer.Option(help="Noise on each copy, relative to its standard deviation.")] = 0.0,
    reinit: Annotated[float, typer.Option(help="Share of each expert's inner units to draw anew.")] = 0.0,
    scale: Annotated[
        float | None, typer.Option(help="Factor on the experts' output; default: weights sum to about one.")
    ] = None,
    every: Annotated[int, typer.Option(help="Make every n-th layer sparse.")] = 1,
    shared_expert: Annotated[bool, typer.Option(help="Keep the dense feed-forward as a shared expert.")] = False,
    seed: Annotated[int, typer.Option(help="Of routers, noise and new units.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 5GB or 300MiB.")] = "5GB",
) -> None:
    """Turn a dense checkpoint into a mixture of experts whose experts start as copies of its feed-forward."""
    from phi35.parameter_count import count_parameters
    from phi35.registry import resolve

    options = resolve("upcycling.options")(
        num_experts=experts,
        top_k=top_k,
        router_type=router_type,
        norm_topk_prob=norm_topk_prob,
        router_init=router_init,
        router_std=router_std,
        noise=noise,
        reinit=reinit,
        scale=scale,
        every=every,
        shared_expert=shared_expert,
        seed=seed,
    )
    config = resolve("upcycling.run")(source, target, options, max_shard_size=max_shard_size)
    count = count_parameters(config)
    layers = f"{len(config.sparse_layers)} of {config.num_hidden_layers} layers sparse"
    print(f"{target}: {experts} experts, {layers}, {count.total:,} parameters, {count.active:,} active")
