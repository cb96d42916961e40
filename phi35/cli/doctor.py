"""``phi35 doctor``: what is installed here, what can run, and why the rest cannot."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REQUIRED = (
    *("torch", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "numpy", "pillow", "timm", "torchvision"),
    *("typer", "tqdm", "pyyaml"),
)
OPTIONAL = {
    "deepspeed": "training over several processes (pip install 'phi35[train]')",
    "webdataset": "reading image shards with other tools; phi35 reads them itself (pip install 'phi35[train]')",
    "matplotlib": "loss curves (pip install 'phi35[train]')",
    "easy-vqa": "image questions at hand (pip install 'phi35[train]')",
    "open_clip_torch": "OpenAI's CLIP weights (pip install 'phi35[clip]')",
    "transformers": "parity tests, interop (pip install 'phi35[transformers]')",
    "megablocks": "the megablocks experts backend on CUDA (make megablocks)",
    "triton": "GPU kernels; comes with CUDA builds of torch",
}


def doctor() -> None:
    """Say what is installed, which devices and expert backends can run, and why the others cannot."""
    from phi35.cli.table import render

    for title, rows in (
        ("Packages", _packages()),
        ("Devices", _devices()),
        ("Expert backends", _backends()),
        ("Compilers", _compilers()),
        ("Default model", _default_model()),
    ):
        print(f"{title}\n{render(rows)}\n")


def _packages() -> list[dict[str, Any]]:
    import phi35

    rows = [
        {"package": "python", "version": platform.python_version(), "state": sys.executable},
        {"package": "phi35", "version": phi35.__version__, "state": "ok"},
    ]
    for name in REQUIRED:
        version = _version(name)
        rows.append({"package": name, "version": version or "-", "state": "ok" if version else "MISSING, required"})
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        state = "ok" if version else f"not installed; needed for {purpose}"
        rows.append({"package": name, "version": version or "-", "state": state})
    return rows


def _devices() -> list[dict[str, Any]]:
    import torch

    rows = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "state": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch",
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}"
        rows.append({"device": f"cuda:{index}", "name": properties.name, "state": memory})
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"torch is built for CUDA {built}, but finds no usable device" if built else "torch is a CPU build"
        rows.append({"device": "cuda", "name": "-", "state": f"none: {reason}"})
    return rows


def _backends() -> list[dict[str, Any]]:
    from phi35.registry import resolve

    report = resolve("experts.backend_report")()
    return [
        {"backend": name, "state": "can run" if reason is None else f"cannot run: {reason}"}
        for name, reason in report.items()
    ]


def _compilers() -> list[dict[str, Any]]:
    rows = []
    for name, purpose in (
        ("cc", "torch.compile, DeepSpeed's CPU optimizer"),
        ("c++", "torch.compile on a CPU, DeepSpeed's CPU optimizer"),
        ("nvcc", "building MegaBlocks"),
        ("ninja", "building extensions"),
    ):
        path = shutil.which(name)
        state = _first_line([path, "--version"]) if path else f"not on the PATH; needed for {purpose}"
        rows.append({"compiler": name, "state": state})
    return rows


def _default_model() -> list[dict[str, Any]]:
    from phi35.api import MODEL_VARIABLE, SMALL_MODEL

    chosen = os.environ.get(MODEL_VARIABLE)
    if chosen:
        folder = Path(chosen).expanduser()
        if folder.is_dir():
            state = "a model folder" if (folder / "config.json").is_file() else "a folder without config.json"
        else:
            state = "no folder here: taken as a hub id" if "/" in chosen else "MISSING: neither a folder nor a hub id"
        return [{"source": MODEL_VARIABLE, "model": chosen, "state": state}]
    weights = sorted(SMALL_MODEL.glob("*.safetensors"))
    state = str(SMALL_MODEL) if weights else f"{SMALL_MODEL} (its weights are missing)"
    return [{"source": "inside the package", "model": state}]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Some builds bring a module without its own metadata.
        found = importlib.util.find_spec(name.replace("-", "_"))
        return "unknown" if found else None


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not answer: {error}"
    lines = (result.stdout or result.stderr).strip().splitlines()
    return (
        f"{command[0]}: {lines[-1] if command[0].endswith('nvcc') and lines else lines[0] if lines else 'no version'}"
    )
