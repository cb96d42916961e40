"""The ``phi35`` command line: one function per command, each in a file of its own."""

import sys


def main() -> None:
    """Entry point: a user's mistake is printed as one message, without a traceback."""
    import typer

    from phi35.cli.chat import chat
    from phi35.cli.convert import convert
    from phi35.cli.doctor import doctor
    from phi35.cli.eval import app as eval_app
    from phi35.cli.export_gguf import export_gguf
    from phi35.cli.generate import generate
    from phi35.cli.plan import plan
    from phi35.cli.plot import plot
    from phi35.cli.presets import presets
    from phi35.cli.quantize import quantize
    from phi35.cli.serve import serve
    from phi35.cli.upcycle import upcycle

    app = typer.Typer(
        help="Train, fine-tune, load and serve the Phi-3.5 series.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (generate, chat, serve, presets, convert, quantize, export_gguf, upcycle, plan, plot, doctor):
        app.command()(command)
    app.add_typer(eval_app, name="eval", help="Evaluate a model on data at hand.")
    try:
        app()
    except (ValueError, OSError) as error:  # OSError: the hub cannot be reached, a disk is full
        print(f"phi35: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
