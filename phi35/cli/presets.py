"""``phi35 presets``: the models of the family and their sizes."""

import json
from typing import Annotated

import typer


def presets(
    tiny: Annotated[bool, typer.Option("--tiny", help="List the tiny-* twins as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """List the presets: layers, widths, context, parameters, cache per token."""
    from phi35 import presets as table
    from phi35.cli.table import render
    from phi35.parameter_count import cache_bytes_per_token, count_parameters

    rows = []
    for name in table.names():
        if name.startswith("tiny-") and not tiny:
            continue
        config = table.get(name)
        count = count_parameters(config)
        experts = f"{config.num_experts_per_tok} of {config.num_local_experts}" if config.is_sparse else "-"
        rows.append(
            {
                "preset": name,
                "layers": config.num_hidden_layers,
                "hidden": config.hidden_size,
                "heads/kv": f"{config.num_attention_heads}/{config.num_key_value_heads}",
                "ffn": config.intermediate_size,
                "experts": experts,
                "images": "yes" if config.vision is not None else "-",
                "context": config.max_position_embeddings,
                "parameters": count.total,
                "active": count.active,
                "KV bytes/token": cache_bytes_per_token(config),
            }
        )
    if as_json:
        print(json.dumps({row["preset"]: row for row in rows}))
        return
    print(render(rows))
    print("\nKV bytes/token: keys and values of all layers in bfloat16. active: what one token passes through.")
