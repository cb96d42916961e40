"""Turns text into token files for training: JSON lines, parquet, webdataset shards of text, folders of text files.

python scripts/prepare_text.py corpus/ more.jsonl --model phi-3.5-mini-instruct/ --output tokens/ --num-workers 16
python scripts/prepare_text.py --output tokens/ --verify

The same command goes on behind the last finished part if it was stopped or killed.
"""

import sys

from phi35.data.command import prepare_from_command_line

if __name__ == "__main__":
    sys.exit(prepare_from_command_line("text", __doc__))
