"""Speculation: what checking a draft costs, and how many tokens per second come at which acceptance.

    python benchmarks/speculation.py                                   # phi-3.5-mini and phi-3.5-moe on a GPU
    python benchmarks/speculation.py --models mini --layers 2          # a model of mini's shape, cut, on a CPU too
    python benchmarks/speculation.py --trained                         # the model in the package, real acceptance

Random weights say nothing of acceptance, so that it is set: a run without drafts gives the text; then drafts are taken
from it, each token right with the given chance, and what the model chooses is computed and replaced by the text (with
random weights rounding alone often decides: "otherwise" is the share of choices that were others). That is prompt
lookup, whose drafts cost nothing, at that acceptance; with --draft-layers a model of so many layers is run for every
draft as well. "Break-even" is how many tokens must be taken of a draft for it to pay. Greedy, one row or --rows, warm.
Prints a table and, last, one JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402
import transformers_peer  # noqa: E402
from decode import PRESETS, SMALL, attempt  # noqa: E402

import phi35  # noqa: E402
from phi35.api import SMALL_MODEL  # noqa: E402
from phi35.generation import step_pool  # noqa: E402
from phi35.generation.decoding import Decoding  # noqa: E402
from phi35.generation.drafting import DraftModel  # noqa: E402
from phi35.generation.feeds import Choice  # noqa: E402
from phi35.generation.rows import Row  # noqa: E402
from phi35.generation.speculation import SpeculativeSteps  # noqa: E402

QUESTIONS = (
    "what color is the shape? what color is the shape? what color is",
    "is there a circle in the image? no. is there a circle in the image?",
    "which image shows a red circle? the first one. which image shows a blue circle?",
    "def area(width, height): return width * height. def area(width, height):",
)


class KnownText:
    """Drafts that are right with a given chance: tokens of a known text, or their neighbours.

    Args:
        rows: the rows.
        texts: the new tokens of each.
        chance: of each token to be right.
        model: drafts as well, and what it says is thrown away; or None.
    """

    def __init__(self, rows: list[Row], texts: list[list[int]], chance: float, model: DraftModel | None) -> None:
        self.rows, self.texts, self.chance, self.model = list(rows), list(texts), chance, model
        self.generator = torch.Generator().manual_seed(0)
        self.num_choices, self.num_others = 0, 0

    def propose(self, counts: list[int]) -> list[list[int]]:
        """See ``phi35.generation.drafting.Drafter``."""
        if self.model is not None:
            self.model.propose(counts)
        drafts = []
        for place, (row, text, count) in enumerate(zip(self.rows, self.texts, counts, strict=True)):
            made = len(row.ids) - row.prompt_length
            known = text[made : made + count]
            right = torch.rand(len(known), generator=self.generator) < self.chance
            drafts.append([token if good else 5 + token % 7 for token, good in zip(known, right.tolist(), strict=True)])
            if self.model is not None and drafts[-1]:
                # As if it had said so itself: what is taken was fed already.
                own, fed = self.model._rows[place].ids, self.model._feed._fed[place]
                own[len(row.ids) :] = drafts[-1]
                fed[len(row.ids) :] = drafts[-1][:-1]
        return drafts

    def replace(self, drafts: list[list[int]], choices: list[list[Choice]]) -> list[list[Choice]]:
        """The known text in place of what a model chose."""
        told = []
        for row, text, draft, chosen in zip(self.rows, self.texts, drafts, choices, strict=True):
            made = len(row.ids) - row.prompt_length
            told.append([Choice(token, 0.0) for token in text[made : made + len(chosen)]])
            for place, (known, found) in enumerate(zip(told[-1], chosen, strict=False)):
                if draft[:place] != text[made : made + place]:
                    break  # behind a wrong draft
                self.num_choices += 1
                self.num_others += known.token != found.token
        return told

    def keep(self, places: list[int]) -> None:
        """See ``phi35.generation.drafting.Drafter``."""
        self.rows, self.texts = [self.rows[place] for place in places], [self.texts[place] for place in places]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "moe"], choices=["mini", "moe"])
    parser.add_argument("--layers", type=int, help="cut the models to so many layers")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8], help="tokens of a draft")
    parser.add_argument("--chances", type=float, nargs="+", default=[0.3, 0.6, 0.8, 0.95])
    parser.add_argument("--quantization", choices=["int4", "int8"], help="of the models' linear layers")
    parser.add_argument("--dtype", help="by default bfloat16 on a GPU and float32 on a CPU")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument(
        "--draft-layers", type=int, nargs="*", default=[4], help="layers of draft models of mini's shape"
    )
    parser.add_argument("--trained", action="store_true", help="the model in the package instead, with real drafts")
    parser.add_argument("--small", action="store_true", help="tiny models: shows that it runs")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"environment": moe_layer.environment(device, arguments.commit)}
    record["environment"]["command"] = " ".join(["python", "benchmarks/speculation.py", *sys.argv[1:]])
    record["environment"]["threads"] = torch.get_num_threads()
    if arguments.trained:
        attempt(record, "trained", lambda: trained(arguments.new_tokens))
    else:
        for model in arguments.models:
            attempt(record, model, lambda m=model: measure(record, arguments, m, device))
    report(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def measure(record: dict[str, Any], arguments: argparse.Namespace, name: str, device: torch.device) -> None:
    """All cases of one model."""
    changes: dict[str, Any] = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
    if arguments.quantization is not None:
        changes["quantization"] = arguments.quantization
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    preset = (SMALL if arguments.small else PRESETS)[name]
    model = phi35.create(preset, device=device, dtype=dtype, seed=0, **changes)
    for rows in arguments.rows:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(5, 900, (rows, arguments.prompt), generator=generator)
        alone = rate(model, ids, arguments.new_tokens)
        case = {"model": name, "rows": rows, "layers": model.config.num_hidden_layers}
        case |= {"dtype": dtype, "quantization": arguments.quantization}
        record.setdefault("rows", []).append(case | {"drafts": "none", "tokens_per_s": alone["tokens_per_s"]})
        print(record["rows"][-1], flush=True)
        for count in arguments.counts:
            for layers in [0, *arguments.draft_layers]:
                sizes = {"num_hidden_layers": layers, "vocab_size": model.config.vocab_size}
                mini = (SMALL if arguments.small else PRESETS)["mini"]
                draft = phi35.create(mini, device=device, dtype=dtype, seed=1, **sizes) if layers else None
                label = f"{layers} layers" if layers else "free"
                attempt(
                    record,
                    f"{name} {rows} {count} {label}",
                    lambda d=draft, n=count, k=label, a=alone, c=case, i=ids: at_chances(
                        arguments, model, d, i, n, k, a, c
                    ),  # type: ignore[misc]
                )
    step_pool.drop(model)


def at_chances(
    arguments: argparse.Namespace,
    model: Any,
    draft: Any,
    ids: torch.Tensor,
    count: int,
    label: str,
    alone: dict[str, Any],
    case: dict[str, Any],
) -> list[dict[str, Any]]:
    """One length of drafts at every acceptance."""
    wrong = rate(model, ids, arguments.new_tokens, count, draft, alone["texts"], 0.0)
    cost = alone["tokens_per_s"] / wrong["tokens_per_s"]
    found = []
    for chance in arguments.chances:
        one = rate(model, ids, arguments.new_tokens, count, draft, alone["texts"], chance)
        row = case | {"drafts": label, "count": count, "chance": chance, "step_cost": cost, "break_even": cost - 1}
        row |= {name: one[name] for name in ("acceptance", "tokens_per_step", "tokens_per_s", "otherwise")}
        row["times"] = one["tokens_per_s"] / alone["tokens_per_s"]
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        found.append(row)
    return found


def rate(
    model: Any,
    ids: torch.Tensor,
    new_tokens: int,
    count: int = 0,
    draft: Any = None,
    texts: list[list[int]] | None = None,
    chance: float = 0.0,
) -> dict[str, Any]:
    """Tokens per second of one way, the second run; without ``texts`` nothing is drafted."""
    found: dict[str, Any] = {}
    drafts: dict[str, Any] = {}
    if texts is not None:
        drafts = {"num_draft_tokens": count}
        drafts |= {"speculation": "prompt_lookup"} if draft is None else {"draft_model": draft}
    for _ in range(2):
        decoding = Decoding(model, ids, max_new_tokens=new_tokens, stop_token_ids=(), **drafts)
        if texts is not None:
            steps = SpeculativeSteps(model, decoding.options, decoding._active, decoding._draft_embeds)
            own = steps._drafter if isinstance(steps._drafter, DraftModel) else None
            known = KnownText(decoding.rows, texts, chance, own)
            steps._drafter = known
            choices = steps.feed.choices
            steps.feed.choices = lambda drafts, c=choices, k=known: k.replace(drafts, c(drafts))  # type: ignore[method-assign]
            decoding._steps = steps
        decoding.step()
        transformers_peer.synchronise()
        first = time.perf_counter()
        before = sum(len(row.ids) for row in decoding.rows)
        while not decoding.done:
            decoding.step()
        transformers_peer.synchronise()
        made = sum(len(row.ids) for row in decoding.rows) - before
        found = {"tokens_per_s": made / (time.perf_counter() - first)}
        found["texts"] = [decoding.new_ids(row) for row in range(len(ids))]
        if texts is not None:
            statistics = decoding.speculation
            assert statistics is not None
            found |= {"acceptance": statistics.acceptance, "otherwise": known.num_others / known.num_choices}
            found["tokens_per_step"] = made / len(ids) / (statistics.steps - 1)
    return found


def trained(new_tokens: int) -> list[dict[str, Any]]:
    """The package's model on texts that repeat themselves: acceptance and rate of each way."""
    model, processor = phi35.load(SMALL_MODEL)
    assert processor is not None
    draft = phi35.load(SMALL_MODEL)[0]
    draft.model.layers = draft.model.layers[:3]
    draft.config = draft.model.config = draft.config.replace(num_hidden_layers=3)
    ways: dict[str, dict[str, Any]] = {"none": {}}
    ways |= {f"lookup, {n}": {"speculation": "prompt_lookup", "num_draft_tokens": n} for n in (2, 4, 8)}
    ways |= {f"its first 3 layers, {n}": {"draft_model": draft, "num_draft_tokens": n} for n in (2, 4)}
    found = []
    base = 0.0
    for name, options in ways.items():
        tokens, spent, drafted, accepted, steps = 0, 0.0, 0, 0, 0
        for _ in range(2):
            tokens, spent, drafted, accepted, steps = 0, 0.0, 0, 0, 0
            for question in QUESTIONS:
                ids = processor(f"<|user|>\n{question}<|end|>\n<|assistant|>\n")["input_ids"]
                decoding = Decoding(model, ids, max_new_tokens=new_tokens, stop_token_ids=(), **options)
                decoding.step()
                start = time.perf_counter()
                while not decoding.done:
                    decoding.step()
                spent += time.perf_counter() - start
                tokens += len(decoding.new_ids(0)) - 1
                if decoding.speculation is not None:
                    drafted += decoding.speculation.drafted
                    accepted += decoding.speculation.accepted
                    steps += decoding.speculation.steps - 1
        base = base or tokens / spent
        row = {"model": "small-vision", "rows": 1, "drafts": name, "tokens_per_s": tokens / spent}
        row |= {"times": tokens / spent / base, "acceptance": accepted / max(1, drafted)}
        row["tokens_per_step"] = tokens / max(1, steps or tokens)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        found.append(row)
    return found


def report(record: dict[str, Any]) -> None:
    """The table."""
    print(
        f"{'model':14s}{'rows':>5s}{'drafts':>24s}{'n':>4s}{'taken':>8s}{'a step':>8s}{'cost':>7s}{'tokens/s':>10s}"
        f"{'times':>7s}"
    )
    for row in record.get("rows", []):
        print(
            f"{row['model']:14s}{row['rows']:5d}{row['drafts']:>24s}{row.get('count', 0):4d}"
            f"{100 * row.get('acceptance', 0):7.1f}%{row.get('tokens_per_step', 1):8.2f}{row.get('step_cost', 1):7.2f}"
            f"{row['tokens_per_s']:10.1f}{row.get('times', 1):7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
