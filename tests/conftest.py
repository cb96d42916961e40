"""Settings of every test: two cores are shared, seeds are fixed, GPU tests skip where there is none."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def no_launcher_variables_left() -> Iterator[None]:
    """Programs that later tests start would look for the process group of a file that trained in this process.

    The group itself stays for the files that train here later: DeepSpeed keeps references to it.
    """
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    devices = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("long") and "long" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make long runs it"))
        if item.get_closest_marker("faults") and "faults" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make faults runs it"))
        if item.get_closest_marker("gpu") and devices < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multigpu") and devices < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what the parity tests measured: the lines they printed, which pytest hides where a test passes."""
    lines = []
    for report in terminalreporter.getreports("passed"):
        where = report.nodeid.split("::")[0].removeprefix("tests/")
        if "parity" in where or "exchange" in where:
            lines += [f"{where}: {line}" for line in report.capstdout.splitlines() if line]
    if lines:
        terminalreporter.section("measured errors")
        for line in sorted(set(lines)):
            terminalreporter.write_line(line)
