"""Turns chats into token files for training, with a mark on what the assistant says.

Records hold {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or
"conversations" with "from" and "value" (ShareGPT). They come from JSON lines, parquet or webdataset shards.

python scripts/prepare_chat.py chats.jsonl --model phi-3.5-mini-instruct/ --output chat-tokens/ --num-workers 16
python scripts/prepare_chat.py --output chat-tokens/ --verify

The same command goes on behind the last finished part if it was stopped or killed.
"""

import sys

from phi35.data.command import prepare_from_command_line

if __name__ == "__main__":
    sys.exit(prepare_from_command_line("chat", __doc__))
