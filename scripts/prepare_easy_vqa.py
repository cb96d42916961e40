"""Writes the easy-vqa pictures and questions to webdataset shards.

python scripts/prepare_easy_vqa.py --output data/easy_vqa
"""

import argparse
from pathlib import Path

from vision.easy_vqa_shards import prepare


def main() -> None:
    """Parses, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/easy_vqa"), help="folder of the shards")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--pairs", type=int, default=24000, help="two-image samples to build")
    parser.add_argument("--draws", type=int, default=6, help="visits of a single picture in an epoch")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    written = prepare(
        args.output,
        args.split,
        num_pairs=args.pairs,
        draws=args.draws,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
    )
    print(
        f"{written.num_pictures} pictures ({args.draws} draws an epoch each) and {written.num_pairs} pairs of the "
        f"{args.split} split, {written.num_bytes / 1e6:.1f} MB: {written.folder}"
    )


if __name__ == "__main__":
    main()
