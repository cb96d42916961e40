"""``phi35 plot``: the curves of a run."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its metrics.jsonl.")],
    output: Annotated[
        Path | None, typer.Option(help="Picture to write (png, pdf, svg); by default curves.png in the run's folder.")
    ] = None,
) -> None:
    """Draw a run's losses, rates, gradient norm, speed, MFU, memory and expert load; also while it runs."""
    from phi35.training.curves import plot as draw
    from phi35.training.curves import read_lines
    from phi35.training.routing import plot_expert_load

    path = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
    history = read_lines(path)
    if not history:
        raise ValueError(f"{str(path)!r} holds no finished step; give the folder of a run that has made one")
    target = output or path.parent / "curves.png"
    panels = draw(history, target, read_lines(path.with_name("evaluations.jsonl")))
    print(f"{target}: steps {history[0]['step']} to {history[-1]['step']}; {', '.join(panels)}")
    if "expert_tokens" in history[-1]:
        heat_map = target.with_name(f"{target.stem}_experts{target.suffix}" if output else "expert_load.png")
        plot_expert_load(history, heat_map)
        print(f"{heat_map}: load of every expert")
