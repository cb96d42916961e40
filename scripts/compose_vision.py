"""Makes an untrained vision model of a text model and a CLIP tower, for the two stages of recipes/.

python scripts/compose_vision.py microsoft/Phi-3.5-mini-instruct --output models/vision-untrained
python scripts/compose_vision.py models/my-text-model --tower clip.safetensors --output models/vision-untrained
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from phi35 import presets
from vision.composition import compose


def main() -> None:
    """Parses, calls, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="folder or hub id of a text model")
    parser.add_argument("--tower", default="openai", help="openai, or a file of open_clip's or pretrain_tower.py's")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--preset", default="phi-3.5-vision", help="whose image side is taken")
    parser.add_argument("--num-crops", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        vision = presets.get(args.preset).vision
        if vision is None:
            raise ValueError(f"preset {args.preset!r} has no image side; take phi-3.5-vision")
        if args.num_crops is not None:
            vision = dataclasses.replace(vision, num_crops=args.num_crops)
        model = compose(args.text, args.tower, args.output, vision, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    image_side = sum(parameter.numel() for parameter in model.model.vision_embed_tokens.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: {total:,} parameters, {image_side:,} of them on the image side")


if __name__ == "__main__":
    main()
