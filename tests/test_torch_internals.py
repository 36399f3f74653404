"""Private names of PyTorch and Triton may be gone in their next releases: everything works without any of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from saccade.operator import torch_internals
from saccade.operator.torch_internals import FAST_PATHS
from saccade.ordinary_tensors import is_ordinary, is_wrapped, may_be_kept
from saccade.triton_dispatch import triton_is_installed

NAMES = sorted({name for path in FAST_PATHS for name in path.needs if triton_is_installed() or "triton" not in name})
if not torch.cuda.is_available():  # builds for the CPU do not have all of them
    NAMES = [name for name in NAMES if "_cuda_" not in name]


def test_all_names_are_there():
    """On the versions that the tests run with; where this fails, something is slower than it was."""
    assert [*torch_internals.fast_paths_off()] == []


def test_everything_works_without_any_of_the_names(device):
    script = Path(__file__).with_name("without_private_names.py")
    done = subprocess.run([sys.executable, script, device, *NAMES], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    faults = {name: outcome["fault"] for name, outcome in outcomes.items() if "fault" in outcome}
    assert not faults, "\n".join(f"without {name or 'deleting anything'}: {fault}" for name, fault in faults.items())
    assert "fast paths: all on" in outcomes.pop("")["doctor"]
    for name, outcome in outcomes.items():
        off = [line for line in outcome["doctor"].splitlines() if line.startswith("fast path off: ")]
        expected = [path for path in FAST_PATHS if name in path.needs]
        assert len(off) == len(expected) > 0
        for path, line in zip(expected, off, strict=True):
            package = name.partition(":")[0].partition(".")[0]
            assert line == (f"fast path off: {path.name}, as {package} has no {name.replace(':', '.')}; {path.without}")


def test_names_of_another_form_are_told(monkeypatch):
    monkeypatch.setattr(torch_internals, "_NO_MODE", -1)
    assert not torch_internals.nothing_watches()
    told = {path.name: why for path, why in torch_internals.fast_paths_off()}
    assert "something traces" in told["dispatch bypass"]
    monkeypatch.undo()
    monkeypatch.setattr(torch_internals, "tensor_guards", lambda: None)
    monkeypatch.setattr(torch_internals, "unknown_launchers", {"CudaLauncher"})
    told = {path.name: why for path, why in torch_internals.fast_paths_off()}
    assert told["known calls"].endswith("TensorGuards has another form than the one known here")
    if triton_is_installed():
        assert told["launch cache"] == "CudaLauncher of triton has another form than those known here"


def test_ordinary_tensors():
    number = torch.ones(3)
    empty = torch.ones(0)
    for tensor in number, empty, number[:0], torch.ones(3, device="meta"), number.requires_grad_():
        assert is_ordinary(tensor)
        assert not is_wrapped(tensor)
        assert may_be_kept(tensor)
    assert not is_ordinary(torch.nn.Parameter(number))
    assert not is_wrapped(torch.nn.Parameter(number))
    with torch.inference_mode():
        assert is_ordinary(torch.ones(3))
        assert not may_be_kept(torch.ones(3))
        assert not may_be_kept(number)  # what is made beside it belongs to that mode
    with FakeTensorMode():
        fake = torch.ones(3)
    assert not is_ordinary(fake)
    assert not is_wrapped(fake)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_tensors_in_transforms_are_not_ordinary(transform):
    seen = []

    def function(x):
        seen.append((is_ordinary(x), is_wrapped(x), may_be_kept(x)))
        return x.sum()

    numbers = torch.ones(3, 2)
    if transform == "jvp":
        torch.func.jvp(function, (numbers,), (numbers,))
    else:
        getattr(torch.func, transform)(function)(numbers)
    assert seen == [(False, transform != "functionalize", False)]


def test_an_empty_tensor_in_a_transform_is_not_ordinary_either():
    seen = []

    def function(x):
        seen.append(is_ordinary(x))
        return x

    torch.func.functionalize(function)(torch.ones(0, 2))
    assert seen == [False]
