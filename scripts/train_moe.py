"""Train a sparse (or dense) text model; without arguments a tiny one on the interpreter's own sources.

deepspeed --num_gpus 2 scripts/train_moe.py                   # two processes, on a CPU too: expert parallel size 2
python scripts/train_moe.py max_steps=200 zero_stage=2        # no launcher
deepspeed scripts/train_moe.py --config run.yaml --deepspeed_config deepspeed_configs/zero2.json
"""

import sys

from phi35.cli.train import run

DEFAULTS = {
    "model": "tiny-phi-3.5-moe",
    "data": "stdlib",
    "sequence_length": 128,
    "global_batch_size": 16,
    "max_steps": 80,
    "learning_rate": 4e-3,
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.0001,
    "output_dir": "runs/train_moe",
}

if __name__ == "__main__":
    sys.exit(run(DEFAULTS))
