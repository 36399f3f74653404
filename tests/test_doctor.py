"""``saccade doctor``: what it says, and that it notices a wrong operator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layout import OPERATORS

import saccade
from saccade import doctor


def test_a_sound_installation(capsys):
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for word in ("saccade", "torch", "triton", "Python", "cpu", "C compiler", "Python headers", saccade.__version__):
        assert word in report
    lines = [line.split() for line in report.splitlines()]
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        for operator in doctor.CHECKS:
            assert [operator, device, doctor.backend(operator, device.split(":")[0]), "ok"] in lines


def test_every_operator_is_checked():
    assert sorted(doctor._FOLDERS.get(name, name) for name in doctor.CHECKS) == sorted(OPERATORS)


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("deformable_aggregation", "deformable_aggregation"),
        ("focal_loss", "softmax_focal_loss"),
        ("gaussian_focal_loss", "gaussian_focal_loss_with_logits"),
    ],
)
def test_an_operator_that_differs(monkeypatch, capsys, operator, function):
    right = getattr(saccade, function)

    def slightly_wrong_in_float32(*args, **kwargs):
        result = right(*args, **kwargs)
        return result * 1.001 if result.dtype == torch.float32 else result

    monkeypatch.setattr(saccade, function, slightly_wrong_in_float32)
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    (line,) = [line for line in report.splitlines() if line.startswith(f"{operator} ") and " cpu " in line]
    assert "differs from the reference: relative error 1.0e-03" in line
    assert "checks failed" in report


def test_an_operator_that_raises(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(saccade, "draw_heatmap", broken)
    assert doctor.main([]) == 1
    assert "RuntimeError: no kernel image is available\n" in capsys.readouterr().out


def test_an_operator_that_gives_not_a_number(monkeypatch):
    right = saccade.gaussian_focal_loss
    monkeypatch.setattr(saccade, "gaussian_focal_loss", lambda *a, **k: right(*a, **k) * float("nan"))
    assert "differs" in (doctor.check("gaussian_focal_loss", "cpu") or "")


def test_missing_toolchain_is_named_with_its_cure(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nonexistent"})
    doctor.main([])
    report = capsys.readouterr().out
    assert "apt-get install gcc" in report
    assert "apt-get install python3-dev" in report


def test_without_triton_no_kernel_is_claimed(monkeypatch):
    assert doctor.backend("deformable_aggregation", "cpu") == "pytorch"
    monkeypatch.setattr(doctor, "triton_is_installed", lambda: True)
    assert doctor.backend("deformable_aggregation", "cuda") == "triton"
    monkeypatch.setattr(doctor, "triton_is_installed", lambda: False)
    assert doctor.backend("deformable_aggregation", "cuda") == "pytorch"
    assert doctor._triton(has_gpu=False) == "not installed"
    assert "pip install triton" in doctor._triton(has_gpu=True)


def test_from_the_command_line_without_the_extras(tmp_path):
    """As with torch alone installed: importing anything of the demo extra fails."""
    for name in ("typer", "rich", "matplotlib", "scipy", "PIL", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('hidden', name={name!r})")
    source = str(Path(saccade.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), source])}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "ignore", "-m", "saccade", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert "deformable_aggregation" in done.stdout
    done = run("demo")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'saccade-ops[demo]'" in done.stderr


def test_debug_checks_nest_and_restore():
    from saccade.debug import debug_checks_enabled

    before = debug_checks_enabled()
    with saccade.debug_checks(True):
        assert debug_checks_enabled()
        with saccade.debug_checks(False):
            assert not debug_checks_enabled()
        assert debug_checks_enabled()
    assert debug_checks_enabled() == before


DEBUG_CHECKS_BY_ENVIRONMENT = """
import os
import torch  # once for all

for value in ("1", "0", ""):
    if os.fork() == 0:
        os.environ["SACCADE_DEBUG"] = value
        from saccade.debug import debug_checks_enabled

        print(repr(value), debug_checks_enabled(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_debug_checks_by_environment_variable():
    """Each value in a process in which nothing of the library is imported yet."""
    command = [sys.executable, "-c", DEBUG_CHECKS_BY_ENVIRONMENT]
    environment = os.environ | {"PYTHONPATH": str(Path(saccade.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["'1' True", "'0' False", "'' False"]
