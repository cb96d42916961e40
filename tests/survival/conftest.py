"""A report of the long fault tests: what was done to a run, and what was left of it."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where ``make faults`` writes its report."""
    parser.addoption("--fault-report", type=Path, help="JSON file to write the outcome of the long fault tests to")


@pytest.fixture(scope="session")
def fault_report(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Takes a fault and its outcome, once a test has checked it; written when all are done."""
    from phi35.training.description import commit, versions

    outcomes: list[dict[str, Any]] = []
    yield lambda fault, **outcome: outcomes.append({"fault": fault, **outcome})
    path = request.config.getoption("--fault-report", default=None)
    if path is None:
        return
    for outcome in outcomes:
        print(json.dumps(outcome))
    described = {
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
        "command": "make faults",
        "outcomes": outcomes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1) + "\n")
