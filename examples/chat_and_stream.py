"""Chats, streaming, batches and seeds with ``phi35.generate``; any folder in Hugging Face form works in place of
the small model, e.g. ``python examples/chat_and_stream.py path/to/phi-3.5-mini-instruct``."""

import sys

import phi35


def main(model: str | None) -> None:
    """Stream one answer, then answer a list of prompts, then sample twice with one seed."""
    messages = [{"role": "user", "content": "what shape is in the image?"}]
    for piece in phi35.generate(messages=messages, model=model, max_new_tokens=16, stream=True):
        print(piece, end="", flush=True)
    print()
    print(phi35.generate(prompt=["is there a circle?", "what color is it?"], model=model, max_new_tokens=16))
    sampled = [phi35.generate(prompt="a story", model=model, max_new_tokens=16, temperature=1.0, seed=7) for _ in "ab"]
    print("same seed, same text:", sampled[0] == sampled[1])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
