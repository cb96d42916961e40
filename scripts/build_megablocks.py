"""Build and install MegaBlocks 0.10.0, stanford-stk 0.7.1 and grouped-gemm 0.3.0 against the torch that is installed.

The published sources are used untouched. MegaBlocks' headers pass an argument to CUB's prefix sums that CUDA 13's CUB
no longer takes; a header put in front of its sources drops it. Its pins (torch 2.7) are passed over by ``--no-deps``:
built with torch 2.11 and 2.14 on CUDA 13.0. CUDA 12 goes by the same steps and is untested.

    python scripts/build_megablocks.py                     # fetches the sources through pip
    python scripts/build_megablocks.py --source FOLDER     # takes FOLDER/*.tar.gz, no network
    python scripts/build_megablocks.py --unpack FOLDER     # Python sources alone, for the tests on a CPU
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGES = (("stanford-stk", "0.7.1"), ("grouped-gemm", "0.3.0"), ("megablocks", "0.10.0"))

FORCED_HEADER = """\
// Put in front of MegaBlocks' sources. Its cumsum.h calls CUB's prefix sums with a last argument debug_synchronous,
// which CUDA 13's CUB no longer takes; the macros drop it after CUB itself has been read.
#pragma once
#define CUB_IGNORE_DEPRECATED_API
#define CUB_WRAPPED_NAMESPACE megablocks
#include <cub/cub.cuh>
#define ExclusiveSum(t, b, i, o, n, s, d) ExclusiveSum(t, b, i, o, n, s)
#define InclusiveSum(t, b, i, o, n, s, d) InclusiveSum(t, b, i, o, n, s)
"""


def main() -> int:
    """Check, fetch, build, import once; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with the three source archives (default: fetch by pip)")
    parser.add_argument("--arch", help="compute capabilities, such as '9.0' or '8.0;9.0' (default: this machine's)")
    parser.add_argument("--target", type=Path, help="install into this folder instead of the environment")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel compilations")
    parser.add_argument("--unpack", type=Path, help="compile nothing: only put the Python sources into this folder")
    arguments = parser.parse_args()
    if arguments.unpack is not None:
        return unpack(arguments.source, arguments.unpack)
    missing = check(arguments.arch)
    if missing:
        print("cannot build MegaBlocks here:", *(f"  - {line}" for line in missing), sep="\n", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        try:
            for name, version in PACKAGES:
                archive = locate(name, version, arguments.source, work)
                install(name, archive, work, arguments)
        except (OSError, RuntimeError) as error:
            print(f"cannot build MegaBlocks here: {error}", file=sys.stderr)
            return 1
    return verify(arguments.target)


def check(arch: str | None) -> list[str]:
    """What this machine lacks, one line each."""
    if importlib.util.find_spec("torch") is None:
        return ["torch is not installed: install a CUDA build of torch 2.11 or later"]
    import torch

    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is built without CUDA: install a CUDA build")
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    if nvcc is None or not nvcc.is_file():
        missing.append("the CUDA compiler nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to it")
    elif torch.version.cuda is not None:
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        major = torch.version.cuda.split(".")[0]
        if f"release {major}." not in release:
            found = release.split("release ")[-1].split(",")[0] if "release " in release else "unknown"
            missing.append(f"nvcc is release {found} but torch was built with CUDA {torch.version.cuda}")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing.append("no C++ compiler (g++) was found")
    for module in ("setuptools", "ninja"):
        if importlib.util.find_spec(module) is None:
            missing.append(f"the Python package {module} is not installed: pip install {module}")
    if not arch and not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        missing.append("no GPU is visible to ask for its compute capability: give --arch, such as --arch 9.0")
    return missing


def locate(name: str, version: str, source: Path | None, work: Path) -> Path:
    """The source archive, from the folder or fetched by pip.

    Raises:
        RuntimeError: if it is not there or cannot be fetched.
    """
    folder = source or work
    if source is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary=:all:", "--dest", str(work), f"{name}=={version}"]
        # setup.py runs for the metadata; with the variable it does not ask a GPU.
        environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")}
        run(command, environment, f"fetching {name} {version}")
    wanted = {f"{stem}-{version}.tar.gz" for stem in (name, name.replace("-", "_"))}
    found = [path for path in folder.glob("*.tar.gz") if path.name in wanted]
    if not found:
        raise RuntimeError(f"{folder} has no {' or '.join(sorted(wanted))}")
    return found[0].resolve()


def unpack(source: Path | None, target: Path) -> int:
    """Put the Python packages of the archives into a folder; returns the exit status."""
    modules = {"stanford-stk": "stk", "grouped-gemm": "grouped_gemm", "megablocks": "megablocks"}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name, version in PACKAGES:
                with tarfile.open(locate(name, version, source, Path(scratch))) as archive:
                    archive.extractall(scratch, filter="data")
                (extracted,) = Path(scratch).glob(f"*-{version}/{modules[name]}")
                shutil.copytree(extracted, target / modules[name], dirs_exist_ok=True)
        except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
            print(f"cannot unpack MegaBlocks' sources: {error}", file=sys.stderr)
            return 1
    print(f"the Python sources of MegaBlocks, stanford-stk and grouped-gemm are in {target}")
    return 0


def install(name: str, archive: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Build one package and install it without its pins.

    Raises:
        RuntimeError: if pip fails.
    """
    environment = {**os.environ, "MAX_JOBS": str(arguments.jobs)}
    if arguments.arch:
        environment["TORCH_CUDA_ARCH_LIST"] = arguments.arch
    elif not environment.get("TORCH_CUDA_ARCH_LIST"):
        import torch

        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    if name == "megablocks":
        header = work / "megablocks_cub.h"
        header.write_text(FORCED_HEADER)
        # Only here: grouped-gemm builds as it is and does not build with the header.
        flags = environment.get("NVCC_PREPEND_FLAGS", "")
        environment["NVCC_PREPEND_FLAGS"] = f"-include {header} {flags}".strip()
    adapt_compiler(environment)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-cache-dir", "--force-reinstall"]
    if arguments.target is not None:
        command += ["--target", str(arguments.target), "--upgrade"]
    run(
        [*command, str(archive)],
        environment,
        f"building {name} (compute capability {environment['TORCH_CUDA_ARCH_LIST']})",
    )


def adapt_compiler(environment: dict[str, str]) -> None:
    """Set what newer torch releases and small toolkits need, without touching the sources."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    entry = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "api" / "include" / "torch" / "all.h"
    if "C++20" in entry.read_text():
        # grouped-gemm asks for C++17; the last of two -std counts.
        flags = environment.get("NVCC_APPEND_FLAGS", "")
        environment["NVCC_APPEND_FLAGS"] = f"{flags} -std=c++20".strip()
    if CUDA_HOME and not Path(CUDA_HOME, "include", "cusparse.h").is_file():
        # A toolkit without the libraries' headers: torch's own dependencies bring them.
        for folder in Path(torch.__file__).parents[1].glob("nvidia/*/include"):
            if (folder / "cusparse.h").is_file():
                environment["CPATH"] = os.pathsep.join(filter(None, (environment.get("CPATH"), str(folder))))


def run(command: list[str], environment: dict[str, str], what: str) -> None:
    """Run a command; on failure say what failed with the end of its output.

    Raises:
        RuntimeError: if it fails.
    """
    print(what, flush=True)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        output = result.stdout + result.stderr
        causes = [line for line in output.splitlines() if "error" in line.lower()][:20]
        raise RuntimeError(f"{what} failed with status {result.returncode}:\n" + "\n".join(causes or [output[-4000:]]))


def verify(target: Path | None) -> int:
    """Import the compiled modules in a fresh interpreter, since a build that links may still not load."""
    code = "import torch, megablocks_ops, grouped_gemm_backend, stk; print('ok')"
    environment = dict(os.environ)
    if target is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(f"built, but the extensions do not load:\n{result.stderr[-2000:]}", file=sys.stderr)
        return 1
    version = importlib.metadata.version("torch")
    print(f"MegaBlocks 0.10.0, stanford-stk 0.7.1 and grouped-gemm 0.3.0 stand, built against torch {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
