"""Teaches the package's small model a question it does not know, with PEFT's LoRA under TRL's SFTTrainer, on a CPU.

The question is whether a shape's colour is a warm one. Takes about 20 seconds; needs ``pip install phi35[trl]``.
"""

import os
import random
import tempfile

from datasets import Dataset
from peft import LoraConfig
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

import phi35
from phi35.adapters.layers import register

FOLDER = os.path.join(os.path.dirname(phi35.__file__), "small_model")
QUESTION = "is the color of the shape warm?"
COLOURS = {"yes": ["red", "orange", "yellow"], "no": ["blue", "navy", "teal"]}


def picture(answer: str, draw: random.Random) -> Image.Image:
    """A shape of a colour with that answer."""
    image = Image.new("RGB", (64, 64), "white")
    left, top, side = draw.randint(2, 20), draw.randint(2, 20), draw.randint(20, 40)
    box = (left, top, left + side, top + side)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(box, fill=draw.choice(COLOURS[answer]))
    return image


def score(model, processor, seed: int, count: int = 16) -> int:
    """Right answers to new pictures."""
    draw, right = random.Random(seed), 0
    for number in range(count):
        answer = ("yes", "no")[number % 2]
        content = [{"type": "image", "image": picture(answer, draw)}, {"type": "text", "text": QUESTION}]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**batch, max_new_tokens=6)
        right += processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer
    return right


def main() -> None:
    """Trains for some seconds and prints the scores before and after."""
    logging.set_verbosity_error()
    phi35.interop.register()
    model, processor = AutoModelForCausalLM.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
    before = score(model, processor, seed=1)
    draw = random.Random(0)
    rows = [
        {
            "images": [picture(answer, draw)],
            "prompt": [{"role": "user", "content": QUESTION}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for answer in ("yes", "no") * 32
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_length=None,
            max_steps=32,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        lora = register(
            LoraConfig(r=8, lora_alpha=16, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
        )
        trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), peft_config=lora)
        trainer.train()
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        trained, _ = phi35.load(folder, device="cpu")
        after = score(merged.eval(), processor, seed=1)
        print(f"right answers of 16 before and after: {before}, {after}; learned: {after >= 12 and after > before}")
        print(phi35.generate(prompt=QUESTION, images=[picture("no", random.Random(7))], model=trained, temperature=0.0))


if __name__ == "__main__":
    main()
