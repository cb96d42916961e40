"""Words to whoever watches a run, which must not end it: a log on a full disk cannot be written either."""

import contextlib
import sys


def warn(text: str) -> None:
    """Writes a warning to stderr, if that can be written."""
    with contextlib.suppress(OSError):
        print(f"warning: {text}", file=sys.stderr, flush=True)
