"""``phi35 eval``: measure a model on data at hand."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Evaluate a model on data at hand."""


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; by default the small model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions of each kind; by default all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that run together.")] = 256,
    mistakes: Annotated[int, typer.Option(help="Print so many wrong answers.")] = 0,
) -> None:
    """Ask the easy-vqa test questions, and two-image questions about its test pictures."""
    import json
    import sys

    from tqdm import tqdm

    from phi35 import api
    from phi35.cli.table import render
    from phi35.evaluation.demo import evaluate, table

    loaded, processor = api.resolve_model(model, device, dtype)
    with tqdm(total=None, unit=" questions", file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = evaluate(loaded, processor, limit=limit, batch_size=batch_size, progress=advance)
    print(render(table(result)))
    for mistake in result.mistakes[:mistakes]:
        print(json.dumps(mistake))
    print(json.dumps(result.to_dict()))
