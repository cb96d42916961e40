"""Builds webdataset shards for vision training, or looks after shards that exist.

python scripts/prepare_vision.py photos/ --output data/photos            # pictures with .txt or .json beside them
python scripts/prepare_vision.py llava_v1_5_mix665k.json --images coco/ --output data/llava --workers 16
python scripts/prepare_vision.py part.parquet --output data/part --max-side 1344
python scripts/prepare_vision.py --index data/foreign                    # indices for shards of another tool
python scripts/prepare_vision.py --check data/llava                      # checksums, descriptions, every picture
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vision.prepare import PrepareSettings, prepare
from vision.records import CAPTION_REQUEST
from vision.sample_reader import MAX_PIXELS
from vision.shard_check import check_shards, index_shards


def main() -> None:
    """Parses, calls, prints."""
    args = parse()
    with tqdm(unit="record" if args.output else "shard", dynamic_ncols=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            report = call(args, show)
        except ValueError as error:
            bar.close()
            sys.exit(f"error: {error}")
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if report.get("damaged"):
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="folder, .jsonl, .json (LLaVA) or .parquet")
    parser.add_argument("--output", type=Path, help="folder of the shards")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="write the missing indices of shards")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="read shards through")
    parser.add_argument("--images", type=Path, help="folder that paths of pictures start from; by default the source's")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--request", default=CAPTION_REQUEST, help="what a caption answers")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger pictures are left out")
    parser.add_argument("--max-side", type=int, default=None, help="reduce pictures to so many pixels on a side")
    args = parser.parse_args()
    if sum(value is not None for value in (args.source, args.index, args.check)) != 1:
        parser.error("give either a source, --index or --check")
    if (args.source is None) != (args.output is None):
        parser.error("a source and --output go together")
    return args


def call(args: argparse.Namespace, show: Any) -> dict[str, Any]:
    """What the arguments ask for."""
    if args.index is not None:
        return index_shards(args.index, num_workers=args.workers, progress=show)
    if args.check is not None:
        return check_shards(args.check, num_workers=args.workers, progress=show)
    settings = PrepareSettings(
        image_root=None if args.images is None else str(args.images),
        samples_per_shard=args.samples_per_shard,
        request=args.request,
        max_pixels=args.max_pixels,
        max_side=args.max_side,
    )
    return prepare(args.source, args.output, settings, num_workers=args.workers, progress=show)


if __name__ == "__main__":
    main()
