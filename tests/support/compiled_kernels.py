"""Compiles Triton kernels for Hopper without a GPU."""

import re
import subprocess
from pathlib import Path
from typing import Any

SHARED_MEMORY = 232448  # bytes a block can have on compute capability 9.0


def compile_kernel(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], num_warps: int) -> Any:
    """A kernel for compute capability 9.0, from its arguments' types; pointers and sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    assert set(arguments) | set(constants) == set(kernel.arg_names)
    places = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    odd = ("fp32", "fp64")
    aligned = [name for name, kind in arguments.items() if kind not in odd and name not in ("capacity", "slots")]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def machine_code(kernel: Any, folder: Path) -> tuple[list[str], int]:
    """The instructions of a compiled kernel, and the bytes of its stack."""
    import triton

    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, code = (
        subprocess.run([tool, option, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "--dump-sass")
    )
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None
    instructions = [found[1] for found in re.finditer(r"/\*[0-9a-f]{4}\*/\s+(.*?);", code)]
    return instructions, int(stack[1])
