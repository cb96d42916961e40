"""Supervised fine-tuning: an adapter (LoRA) on a model of the family, or all of it, on chats or pictures.

    python scripts/finetune.py                                          # a tiny sparse model, an adapter on its experts
    deepspeed --num_gpus 8 scripts/finetune.py --config recipes/lora_moe.yaml data=chats.jsonl
    python scripts/finetune.py model=Phi-3.5-mini-instruct data=chats.jsonl adapter.rank=32 adapter.alpha=64
    python scripts/finetune.py model=phi-3.5-vision-folder data=shards/ adapter.targets=[attention,feed_forward]
    deepspeed scripts/finetune.py --config recipes/chat_finetuning.yaml adapter=null     # all weights

Data are those of scripts/train_moe.py and train_vision.py: chats as JSON lines (loss on the assistant's turns), packed,
or shards of pictures. An adapter is written to OUTPUT_DIR/adapter in PEFT's form; export_merged=true writes the merged
model besides. scripts/convert_adapter.py turns adapters into other forms.
"""

import sys

from phi35.cli.train import run

DEFAULTS = {
    "model": "tiny-phi-3.5-moe",
    "data": "stdlib",
    "sequence_length": 256,
    "global_batch_size": 8,
    "max_steps": 40,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "adapter": {"rank": 16, "alpha": 32},
    "output_dir": "runs/finetune",
}

if __name__ == "__main__":
    sys.exit(run(DEFAULTS, description=__doc__))
