"""``phi35 eval``: measure a model on data at hand."""

from pathlib import Path
from typing import Annotated, Any

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


@app.command()
def needles(
    output: Annotated[Path, typer.Option(help="Folder for answers, table and picture; a second call goes on there.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; by default the small model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="single, multi_key, ...; by default all.")] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Tokens; by default 4k to the model's limit.")] = None,
    depths: Annotated[list[float] | None, typer.Option(help="Between 0 and 1.")] = None,
    samples: Annotated[int, typer.Option(help="Questions of each task, length and depth.")] = 4,
    num_needles: Annotated[int, typer.Option(help="Needles of the tasks with several.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    haystack: Annotated[Path | None, typer.Option(help="Text whose lines hide the needles; else made up.")] = None,
) -> None:
    """Ask for needles in long texts (RULER's way): scores by length and depth, with a picture."""
    import json
    import sys

    from tqdm import tqdm

    from phi35 import api
    from phi35.cli.table import render
    from phi35.evaluation import needle_run

    given = {"tasks": tasks, "lengths": lengths, "depths": depths}
    chosen: dict[str, Any] = {name: tuple(values) for name, values in given.items() if values}
    loaded, processor = api.resolve_model(model, device, dtype)
    if not lengths:
        limit = loaded.config.max_position_embeddings
        chosen["lengths"] = tuple(length for length in needle_run.NeedleSuite.lengths if length <= limit) or (limit,)
    suite = needle_run.NeedleSuite(
        **chosen, samples=samples, num_needles=num_needles, max_new_tokens=max_new_tokens, seed=seed
    )
    sentences = [line.strip() for line in haystack.read_text().splitlines() if line.strip()] if haystack else None
    with tqdm(total=None, unit=" questions", file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        lines = needle_run.evaluate(loaded, processor, suite, output, haystack=sentences, progress=advance)
    picture = output / "needles.png"
    needle_run.plot(lines, picture, title=model or "small model")
    rows = needle_run.table(lines)
    print(render(rows))
    print(f"{picture}: score by depth and length")
    print(json.dumps({"questions": len(lines), "table": rows}))


@app.command()
def tasks(
    names: Annotated[list[str], typer.Option("--tasks", help="Tasks of the harness; again for each.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; by default the small model.")] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="Folder with task files of your own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that run together.")] = 8,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; by default the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions of each task.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap questions by the model's chat template.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a prompt; of longer ones the last.")] = None,
    cache: Annotated[Path | None, typer.Option(help="File that keeps answers from run to run.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Run tasks of lm-evaluation-harness, its own or local files (no network is needed for these)."""
    import json

    from phi35 import api

    try:
        from lm_eval.utils import make_table

        from phi35.evaluation import harness
    except ImportError as error:
        raise ValueError(f"needs lm-evaluation-harness ({error}): pip install 'phi35[harness]'") from None
    loaded, processor = api.resolve_model(model, device, dtype)
    results = harness.evaluate(
        loaded,
        processor,
        names,
        include_path=include_path or (),
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        limit=limit,
        chat=chat,
        cache=cache,
        max_length=max_length,
    )
    print(make_table(results))
    kept = {name: results[name] for name in ("results", "groups", "n-shot", "versions") if name in results}
    line = json.dumps({"model": model or "small model", **kept}, default=float)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n")
    print(line)


@app.command()
def report(
    inputs: Annotated[
        list[Path], typer.Argument(help="Results of eval tasks, needles and demo, records of benchmarks.")
    ],
    output: Annotated[Path, typer.Option(help="Page to write: .md or .html.")],
    model: Annotated[str, typer.Option(help="Preset whose published scores stand beside.")] = "phi-3.5-mini",
) -> None:
    """Write one page with a model's scores beside the published ones, its speed and memory."""
    from phi35.evaluation.report import collect, write

    card = collect(model, inputs)
    write(card, output)
    print(f"{output}: {', '.join(f'{title} ({len(rows)} rows)' for title, rows in card.tables.items())}")
