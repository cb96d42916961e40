"""One rule for devices and dtypes."""

import warnings

import pytest
import torch

from phi35.device import computed_dtype, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_the_cpu_takes_float32_unless_asked() -> None:
    assert pick_dtype(None, CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == pick_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert pick_dtype(None, torch.device("meta")) == torch.float32


def test_a_device_without_bfloat16_takes_the_next_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="cuda device does not compute in bfloat16: taking float16"):
        assert computed_dtype(torch.bfloat16, "cuda", (torch.float16,)) == torch.float16
    with pytest.warns(UserWarning, match="mps device does not compute in bfloat16: taking float32"):
        assert computed_dtype(torch.bfloat16, "mps", ()) == torch.float32
    with pytest.warns(UserWarning, match="float16: taking float32"):
        assert computed_dtype(torch.float16, "mps", (torch.bfloat16,)) == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = (torch.bfloat16, torch.float16)
        assert computed_dtype(torch.bfloat16, "cuda", both) == torch.bfloat16
        assert computed_dtype(torch.float16, "cuda", both) == torch.float16


def test_bad_names_and_absent_devices_are_named() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        pick_dtype("int8", CPU)
    with pytest.raises(ValueError, match="no float64"):
        pick_dtype("float64", torch.device("mps"))
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        pick_device("gpu")


@pytest.mark.gpu
def test_a_gpu_takes_bfloat16_where_it_computes_in_it() -> None:
    expected = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    assert pick_dtype(None, pick_device(None)) == expected
