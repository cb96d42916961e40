"""Train a vision model; without arguments a tiny one on easy-vqa's pictures and questions.

python scripts/train_vision.py
deepspeed --num_gpus 2 scripts/train_vision.py zero_stage=2 freeze=[tower]
python scripts/train_vision.py --config run.yaml data=path/to/shards
"""

import sys

from phi35.cli.train import run

DEFAULTS = {
    "model": "tiny-phi-3.5-vision",
    "data": "easy-vqa",
    "global_batch_size": 16,
    "max_steps": 60,
    "learning_rate": 3e-3,
    "output_dir": "runs/train_vision",
}
TINY = {
    "model_overrides": {"vision": {"num_crops": 1}},  # a picture of 64 pixels as two crops, not five
    "data_options": {"cache_decoded": True},
}

if __name__ == "__main__":
    sys.exit(run(DEFAULTS, with_default_model=TINY))
