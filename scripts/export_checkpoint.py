"""Write the model of a training checkpoint in Hugging Face form.

python scripts/export_checkpoint.py runs/train_moe exported            # newest checkpoint of a run
python scripts/export_checkpoint.py runs/train_moe/checkpoints/step-00000080 exported --dtype bfloat16
python scripts/export_checkpoint.py runs/train_moe exported --average  # the moving average of its weights (ema_decay)
"""

import argparse
import sys

from phi35.training.export import export


def main() -> int:
    """Parse, export, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a training checkpoint, or a run's folder")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default the run's")
    parser.add_argument("--processor", help="folder with the tokenizer, where the run's is elsewhere now")
    parser.add_argument("--average", action="store_true", help="the moving average in place of the weights")
    parser.add_argument("--best", action="store_true", help="of a run: the checkpoint with the lowest held-out loss")
    options = parser.parse_args()
    try:
        folder = export(
            options.checkpoint,
            options.output,
            dtype=options.dtype,
            processor_folder=options.processor,
            average=options.average,
            best=options.best,
        )
    except ValueError as error:
        print(f"error: {error}")
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
