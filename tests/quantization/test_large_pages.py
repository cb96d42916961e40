"""Large pages under few-bit weights: which memory is asked for, and that weights are what they were."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import phi35
from phi35.quantization.config import QuantizationConfig, WeightFormat
from phi35.quantization.cpu import pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise is Linux's")


def large_kilobytes() -> int:
    """What this process has in large pages."""
    return sum(map(int, re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps").read_text())))


def test_whole_pages_within_large_tensors_are_asked_for() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages to give")
    before = large_kilobytes()
    model = nn.Linear(4096, 4096, bias=True, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    assert 2**25 - 2 * pages.PAGE < (asked := pages.ask_for_large_pages(model)) <= 2**25
    with torch.no_grad():
        model.weight.fill_(3.0)
    assert asked % pages.PAGE == 0 and bool((model.weight == 3).all())
    found = (large_kilobytes() - before) * 1024
    print(f"{found} of {asked} bytes are in large pages")
    # The system may be short of them; a machine with memory to spare gives all.
    assert 0 <= found <= 2**25


def test_small_tensors_and_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages.ask_for_large_pages(nn.Linear(512, 512)) == 0
    monkeypatch.setattr(pages.sys, "platform", "darwin")
    assert pages.ask_for_large_pages(nn.Linear(4096, 4096)) == 0


def test_few_bit_models_on_a_cpu_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(pages, "ask_for_large_pages", lambda model: asked.append(model) or 0)
    model = phi35.create(
        "tiny-phi-3.5-mini", quantization=QuantizationConfig(linear=WeightFormat(group_size=32)), seed=0
    )
    phi35.create("tiny-phi-3.5-mini", seed=0)
    assert asked == [model]
