"""The server under concurrent streams: time to first token, time between tokens, tokens per second, memory.

    python benchmarks/serve.py                                          # the package's small model on the CPU
    python benchmarks/serve.py --preset phi-3.5-mini --dtype bfloat16   # random weights, on a GPU

A closed loop: each of N clients sends one completion after the other (ids in, server-sent events out, greedy, a fixed
number of new tokens) over connections of its own, from a process apart from the server's. The same prompts also go
through the batcher without HTTP, which is what the server can reach at most. Every text is compared with the one that
its prompt gets in a plain batch of ``Decoding``: all must be equal in float32 on a CPU, elsewhere the share is told.
Prints a table and, last, one JSON line.
"""

import argparse
import asyncio
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import moe_layer  # noqa: E402

import phi35  # noqa: E402
from phi35.api import SMALL_MODEL  # noqa: E402
from phi35.byte_level import byte_of_character  # noqa: E402
from phi35.generation.batcher import Batcher  # noqa: E402
from phi35.generation.decoding import Decoding  # noqa: E402
from phi35.processor import Processor  # noqa: E402
from phi35.tokenizer import Tokenizer  # noqa: E402

PACKAGES = ("fastapi", "starlette", "uvicorn", "h11", "httpcore")
CALLS_EACH = {1: 8, 8: 4, 32: 3}
"""Calls of each client, by the number of clients; 2 for other numbers."""


@dataclass
class Timing:
    """One call as its client saw it, seconds from when it was sent."""

    prompt: int
    text: str = ""
    first: float | None = None
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="random weights of this preset; default: the package's small model")
    parser.add_argument("--layers", type=int, help="cut the preset to so many layers")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 200])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", help="default: CUDA where there is one")
    parser.add_argument("--dtype")
    parser.add_argument("--repeats", type=int, default=1, help="times that the last number of streams is repeated")
    parser.add_argument("--commit", help="recorded in the result (default: asked of git)")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(arguments, theirs), daemon=True)
    child.start()
    theirs.close()
    described = ours.recv()
    device = torch.device(described.pop("device"))
    record: dict[str, Any] = {"environment": environment(device, arguments), **described, "served": []}
    try:
        asyncio.run(measure(record, arguments, child.pid, ours))
    finally:
        ours.close()
        child.join(60)
    show(record)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def environment(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, command, commit."""
    found = moe_layer.environment(device, arguments.commit)
    found["command"] = " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]])
    found["cores"] = os.cpu_count()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        names = (
            line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        )
        found["cpu"] = next(names, None)
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts that are all different, the same at every call."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, min(vocab, 1000), (count, length), generator=generator).tolist()


def load(arguments: argparse.Namespace) -> tuple[Any, Processor]:
    """The model and its processor; a preset of random weights gets a word for each token."""
    if arguments.preset is None:
        device = arguments.device or "cpu"
        model, processor = phi35.load(SMALL_MODEL, device=device, dtype=arguments.dtype or "float32")
        assert processor is not None
        return model, processor
    changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    model = phi35.create(arguments.preset, seed=0, device=arguments.device, dtype=arguments.dtype, **changes)
    return model, Processor(words(model.config.vocab_size), model.config)


def words(vocab_size: int) -> Tokenizer:
    """A tokenizer whose every token is a word of its own, so that texts tell the ids."""
    space = next(character for character, byte in byte_of_character().items() if byte == 32)
    vocab = {f"{space}w{number}": number for number in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend.to_str(), {})


def serve(arguments: argparse.Namespace, pipe: Any) -> None:
    """The server's process: what is expected, the batcher alone, then the server until the pipe closes."""
    from phi35.serving.app import build_service, create_app
    from phi35.serving.server import GracefulServer
    from phi35.serving.settings import ServingSettings

    model, processor = load(arguments)
    most, length, new = max(arguments.streams), arguments.prompt_tokens, arguments.new_tokens
    rows = most
    pages = rows * (-(-(length + new + 1) // 64)) * 64
    all_prompts = prompts(most, length, model.config.vocab_size)
    settings = ServingSettings(
        model_name="bench", max_rows=rows, max_cache_tokens=pages, max_waiting=rows, drain_seconds=1.0
    )
    service = build_service(model, processor, settings)
    batcher = service.engine.batcher
    alone = [time_batcher(batcher, all_prompts[:count], new) for count in arguments.streams]
    described = {
        "device": str(model.device),
        "model": arguments.preset or "small-vision",
        "dtype": str(model.dtype).removeprefix("torch."),
        "mode": batcher.mode,
        "prompt_tokens": length,
        "new_tokens": new,
        "texts": reference(model, processor, all_prompts, new),
        "batcher": alone,
    }
    server = GracefulServer(create_app(service), service, "127.0.0.1", 0, log_level="error")

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        pipe.send(described | {"port": server.bound_port})
        while not pipe.poll():
            await asyncio.sleep(0.1)
        server.should_exit = True
        await serving

    asyncio.run(run())


def time_batcher(batcher: Batcher, chosen: list[list[int]], new: int) -> dict[str, Any]:
    """Tokens per second of as many requests at once, without HTTP, warm."""
    seconds, cpu = [], 0.0
    for _ in range(2):
        began, cpu = time.perf_counter(), time.process_time()
        for ids in chosen:
            batcher.submit(torch.tensor(ids), max_new_tokens=new, stop_token_ids=())
        count = sum(1 for _ in batcher.run())
        seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
    return {"streams": len(chosen), "tokens_per_s": count / seconds[-1], "cpu_ms_per_token": 1000 * cpu / count}


def reference(model: Any, processor: Processor, chosen: list[list[int]], new: int) -> list[str]:
    """The texts of plain batches."""
    texts = []
    for start in range(0, len(chosen), 50):
        part = torch.tensor(chosen[start : start + 50])
        decoding = Decoding(model, part, max_new_tokens=new, stop_token_ids=(), fast=False)
        while not decoding.done:
            decoding.step()
        texts += [processor.tokenizer.decode(decoding.new_ids(row)) for row in range(len(part))]
    return texts


async def measure(record: dict[str, Any], arguments: argparse.Namespace, pid: int | None, pipe: Any) -> None:
    """All numbers of streams, after a warm-up."""
    port, texts = record.pop("port"), record.pop("texts")
    every = prompts(max(arguments.streams), arguments.prompt_tokens, 1000)
    await run_clients(port, every[:2], 1, arguments.new_tokens)
    last = arguments.streams[-1]
    for streams in [*arguments.streams, *[last] * (arguments.repeats - 1)]:
        began, client_cpu, server_cpu = time.perf_counter(), time.process_time(), processor_seconds(pid)
        timings = await run_clients(port, every[:streams], CALLS_EACH.get(streams, 2), arguments.new_tokens)
        seconds = time.perf_counter() - began
        wrong = sum(timing.text != texts[timing.prompt] for timing in timings)
        if wrong and record["dtype"] == "float32" and record["mode"] == "plain":
            raise SystemExit(f"{wrong} of {len(timings)} texts at {streams} streams are not their prompt's")
        made = len(timings) * arguments.new_tokens
        firsts = [timing.first for timing in timings if timing.first is not None]
        record["served"].append(
            {
                "streams": streams,
                "calls": len(timings),
                "tokens_per_s": made / seconds,
                "other_texts": wrong,
                "server_cpu_ms_per_token": 1000 * (processor_seconds(pid) - server_cpu) / made,
                "client_cpu_ms_per_token": 1000 * (time.process_time() - client_cpu) / made,
                "first_token_ms": percentiles(firsts),
                "between_chunks_ms": percentiles([gap for timing in timings for gap in timing.gaps]),
                "call_ms": percentiles([timing.end for timing in timings]),
                "server_mb": resident(pid),
            }
        )
    pipe.send("end")


async def run_clients(port: int, chosen: list[list[int]], calls: int, new: int) -> list[Timing]:
    """Each prompt's client makes its calls, one after the other."""

    async def client(number: int) -> list[Timing]:
        # A pool of its own: one for all walks through every connection at each event.
        async with httpcore.AsyncConnectionPool(max_connections=1) as pool:
            return [await call(pool, port, number, chosen[number], new) for _ in range(calls)]

    return [timing for part in await asyncio.gather(*map(client, range(len(chosen)))) for timing in part]


async def call(pool: httpcore.AsyncConnectionPool, port: int, number: int, ids: list[int], new: int) -> Timing:
    """One streamed completion."""
    body = {"model": "bench", "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
    timing, pieces, held = Timing(number), [], b""
    began = last = time.perf_counter()
    async with pool.stream(
        "POST",
        f"http://127.0.0.1:{port}/v1/completions",
        headers=[("host", "127.0.0.1"), ("content-type", "application/json")],
        content=json.dumps(body).encode(),
        extensions={"timeout": {"read": 300.0, "connect": 60.0, "pool": 300.0, "write": 60.0}},
    ) as response:
        if response.status != 200:
            raise SystemExit(f"the server answers {response.status}: {await response.aread()!r}")
        async for part in response.aiter_stream():
            now = time.perf_counter()
            if timing.first is None:
                timing.first = now - began
            else:
                timing.gaps.append(now - last)
            last = now
            held += part
            *events, held = held.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    value = json.loads(event[6:])
                    if "error" in value:
                        raise SystemExit(f"a stream failed: {value['error']}")
                    pieces.append(value["choices"][0]["text"])
    timing.end, timing.text = last - began, "".join(pieces)
    return timing


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile and the largest, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90, 99)}
    at |= {"mean": statistics.fmean(ordered), "most": ordered[-1]}
    return {name: round(1000 * value, 3) for name, value in at.items()}


def processor_seconds(pid: int | None) -> float:
    """Time that the server's process has had of the processors; 0 where the system does not tell it."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.is_file():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int | None) -> float | None:
    """Memory of the server's process in megabytes, where the system tells it."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def show(record: dict[str, Any]) -> None:
    """The table."""
    print(f"{record['model']}, {record['dtype']}, {record['mode']}, {record['environment']['device']}")
    alone = {row["streams"]: row for row in record["batcher"]}
    print(
        "| streams | tokens/s | of the batcher alone | first token p50 / p99, ms | between p50 / p99, ms | "
        "server's CPU ms a token (batcher alone) | MB | other |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in record["served"]:
        first, gaps = row["first_token_ms"], row["between_chunks_ms"]
        print(
            f"| {row['streams']} | {row['tokens_per_s']:.0f} | "
            f"{row['tokens_per_s'] / alone[row['streams']]['tokens_per_s']:.0%} | "
            f"{first['p50']:.1f} / {first['p99']:.1f} | {gaps['p50']:.1f} / {gaps['p99']:.1f} | "
            f"{row['server_cpu_ms_per_token']:.2f} ({alone[row['streams']]['cpu_ms_per_token']:.2f}) | "
            f"{row['server_mb']} | "
            f"{row['other_texts']} of {row['calls']} |"
        )


if __name__ == "__main__":
    main()
