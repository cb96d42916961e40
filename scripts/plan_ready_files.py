"""Write the planned columns of deepspeed_configs/README.md: the largest model that fits with each ready file.

python scripts/plan_ready_files.py
"""

import argparse
import sys
from pathlib import Path

from phi35.planning.ready_files import KINDS, Row, largest

README = Path(__file__).resolve().parents[1] / "deepspeed_configs" / "README.md"


def main() -> int:
    """Plans every row and rewrites the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = README.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("| `"):
            row = Row.parse(line)
            lines[number] = row.render([largest(row, README.parent, kind).cell() for kind in KINDS])
            print(lines[number], flush=True)
    README.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
