"""Loading holds the weights and at most one shard on the host."""

import json
import subprocess
import sys

import phi35

MEASURE = """
import json, re, sys, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import phi35
from phi35.loading import load

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

tiny = phi35.create("tiny-phi-3.5-moe")
tiny(torch.tensor([[1, 2]]))  # everything imported, the allocator warm
before = status("VmRSS")
for dtype in ("bfloat16", "float32"):  # the smaller first: the high-water mark only rises
    model, _ = load(sys.argv[1], device="cpu", dtype=dtype)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps({"peak": status("VmHWM") - before, "weights": weights}))
    del model
"""
MIB = 2**20


def test_peak_host_memory_is_the_weights_and_one_shard(tmp_path):
    # Experts and q, k, v of one memory tensor lie in different shards: they must be filled in place.
    model = phi35.create(
        "tiny-phi-3.5-moe", seed=0, hidden_size=512, intermediate_size=2048, num_local_experts=8, head_dim=16
    )
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    phi35.save(model, None, tmp_path, max_shard_size="60MB")
    files = list(tmp_path.glob("*.safetensors"))
    largest = max(file.stat().st_size for file in files)
    assert size > 150 * MIB and len(files) >= 3
    del model

    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    half, same = (json.loads(line) for line in result.stdout.splitlines()[-2:])
    assert same["weights"] == size
    # Measured with weights of 197 MiB (float32) and a shard of 56 MiB: peaks of 139 MiB (bfloat16) and 227 MiB.
    for name, run in (("bfloat16", half), ("float32", same)):
        print(
            f"{name}: weights {run['weights'] / MIB:.1f} MiB, shard {largest / MIB:.1f}, peak {run['peak'] / MIB:.1f}"
        )
        assert run["weights"] / 2 < run["peak"] <= run["weights"] + largest + 8 * MIB
