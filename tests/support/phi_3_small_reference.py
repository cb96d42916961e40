"""phi-3-small's published formulas in slow float64 loops: what the model is compared with.

Written from the formulas alone, for one sequence at a time, over a checkpoint's published names and the published
keys of its config.json.
"""

import functools
import math

import torch


def visible(config, head, query, key):
    """Whether a head's query at a place sees the key at another, in a block-sparse layer."""
    size = config["blocksparse_block_size"]
    query_block, key_block = query // size, key // size
    if key > query:
        return False
    if query_block - key_block < config["blocksparse_num_local_blocks"]:
        return True
    stride = config["blocksparse_vert_stride"]
    step = max(1, int(stride / config["num_attention_heads"]))
    offset = 0 if config["blocksparse_homo_head_pattern"] else head * step
    return (key_block + offset + 1) % stride == 0


@functools.cache
def hidden_from_view(settings, head, length):
    """(length, length) bool, True where ``visible`` says no; settings are the config's items that it reads."""
    config = dict(settings)
    rows = [[not visible(config, head, query, key) for key in range(length)] for query in range(length)]
    return torch.tensor(rows)


def is_dense(config, layer):
    every = config["dense_attention_every_n_layers"]
    return bool(every) and (layer + 1) % every == 0


def rotary(config, length, head_dim):
    """cos and sin (length, head_dim / 2) of a sequence of that length."""
    scaling, base = config.get("rope_scaling"), config["rope_embedding_base"]
    factors, multiplier = [1.0] * (head_dim // 2), 1.0
    if scaling is not None:
        kind = "long" if length > scaling["original_max_position_embeddings"] else "short"
        factors, multiplier = scaling[f"{kind}_factor"], scaling[f"{kind}_mscale"]
    cos, sin = torch.empty(length, head_dim // 2).double(), torch.empty(length, head_dim // 2).double()
    for position in range(length):
        for pair in range(head_dim // 2):
            angle = position / (factors[pair] * base ** (2 * pair / head_dim))
            cos[position, pair] = math.cos(angle) * multiplier
            sin[position, pair] = math.sin(angle) * multiplier
    return cos, sin


def rotated(vectors, cos, sin):
    """(length, head_dim): element i of the first half turns with element i of the second."""
    half = vectors.shape[1] // 2
    first, second = vectors[:, :half], vectors[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def layer_norm(states, weight, bias, eps):
    mean = states.mean(dim=-1, keepdim=True)
    variance = ((states - mean) ** 2).mean(dim=-1, keepdim=True)
    return (states - mean) / torch.sqrt(variance + eps) * weight + bias


def attention(config, state, layer, states):
    length, width = states.shape
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, shared = width // heads, heads // groups
    prefix = f"model.layers.{layer}.self_attn."
    mixed = states @ state[prefix + "query_key_value.weight"].T + state[prefix + "query_key_value.bias"]
    mixed = mixed.view(length, groups, shared + 2, head_dim)
    cos, sin = rotary(config, length, head_dim)
    norm = head_dim / config["mup_attn_multiplier"] if config["mup_use_scaling"] else math.sqrt(head_dim)
    outputs = []
    for head in range(heads):
        group = head // shared
        query = rotated(mixed[:, group, head % shared], cos, sin)
        key, value = rotated(mixed[:, group, shared], cos, sin), mixed[:, group, shared + 1]
        scores = query @ key.T / norm
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if not is_dense(config, layer):
            settings = {name: config[name] for name in config if name.startswith("blocksparse")}
            settings["num_attention_heads"] = heads
            hidden = hidden_from_view(tuple(sorted(settings.items())), head, length)
        scores = scores.masked_fill(hidden, -math.inf)
        outputs.append(torch.softmax(scores, dim=1) @ value)
    return torch.cat(outputs, dim=1) @ state[prefix + "dense.weight"].T + state[prefix + "dense.bias"]


def feed_forward(config, state, layer, states):
    prefix = f"model.layers.{layer}.mlp."
    both = states @ state[prefix + "up_proj.weight"].T + state[prefix + "up_proj.bias"]
    limit = config["gegelu_limit"]
    gate, linear = both[:, 0::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
    acted = gate / (1 + torch.exp(-1.702 * gate)) * (linear + 1)
    return acted @ state[prefix + "down_proj.weight"].T + state[prefix + "down_proj.bias"]


def logits(config, state, ids, dummies=()):
    """(length, vocabulary) float64.

    Args:
        config: the contents of a published config.json.
        state: published name -> tensor.
        ids: a list of ids.
        dummies: ids that are never written; their logits are float64's least number.
    """
    state = {name: tensor.double() for name, tensor in state.items()}
    eps = config["layer_norm_epsilon"]
    states = state["model.embed_tokens.weight"][ids] * config["mup_embedding_multiplier"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms = [
            (state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"], eps)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        states = states + attention(config, state, layer, layer_norm(states, *norms[0]))
        states = states + feed_forward(config, state, layer, layer_norm(states, *norms[1]))
    states = layer_norm(states, state["model.final_layernorm.weight"], state["model.final_layernorm.bias"], eps)
    result = states @ state["model.embed_tokens.weight"].T / config["mup_width_multiplier"]
    result[:, list(dummies)] = torch.finfo(torch.float64).min
    return result


def loss(config, state, ids, dummies=()):
    """Mean cross-entropy of predicting each id from those before it."""
    log_probs = torch.log_softmax(logits(config, state, ids, dummies), dim=1)
    return -torch.stack([log_probs[place, token] for place, token in enumerate(ids[1:])]).mean()
