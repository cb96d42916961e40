"""Turn an adapter in PEFT's form into another form, or merge it into its model.

    python scripts/convert_adapter.py runs/finetune/adapter vllm-adapter --model phi-3.5-moe-folder --form published
    python scripts/convert_adapter.py adapter split-adapter --model folder --form split
    python scripts/convert_adapter.py adapter merged-model --model folder --form merged      # a tensor at a time

Forms: fused (this package; PEFT on transformers' phi3), split (q_proj, k_proj, v_proj, gate_proj, up_proj; PEFT on
transformers' phimoe), published (the checkpoint's own names, an adapter for each expert, which vLLM reads), merged.
--model is a folder or hub id; for the first three a preset's name will do.
"""

import argparse
import sys

from phi35 import presets
from phi35.adapters.merging import merge_folder
from phi35.adapters.names import FORMS, convert_folder
from phi35.loading import find_folder, load_config


def main() -> int:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--model", required=True, help="that the adapter belongs to")
    parser.add_argument("--form", required=True, choices=(*FORMS, "merged"))
    options = parser.parse_args()
    try:
        if options.form == "merged":
            merge_folder(options.model, options.adapter, options.output)
        else:
            known = options.model in presets.names()
            config = presets.get(options.model) if known else load_config(find_folder(options.model))
            convert_folder(options.adapter, options.output, config, options.form)
    except ValueError as error:
        print(f"error: {error}")
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
