"""``saccade bench``: its exact results, what it refuses to time, its records and the tables made of them."""

import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import saccade
from cases.deformable_aggregation import make, oracle
from saccade import doctor
from saccade.cli import app

ROOT = Path(__file__).parents[1]

# As `saccade bench` does: the benchmarks are beside the package, not in it.
sys.path.insert(0, str(ROOT / "benchmarks"))
accuracy, aggregation, aggregation_oracle, losses, losses_oracle, run, tables, workloads = map(
    importlib.import_module,
    ("accuracy", "aggregation", "aggregation_oracle", "losses", "losses_oracle", "run", "tables", "workloads"),
)

KEYS = {
    *("workload", "pass", "dtype", "clock", "saccade_us", "floor_us", "baselines", "recorded", "error"),
    *("backend", "gpu", "torch", "triton", "commit"),
}
PASSES = {"forward", "backward", "backward-deterministic", "forward+backward"}

runner = CliRunner()


# ---- the exact results


def exactly_representable():
    """Inputs whose pixel coordinates are exact in float32: there, float64 means the same."""
    features, shape, start, location, weights = make([[(8, 16), (4, 8)], [(8, 16), (4, 8)], [(2, 4), (1, 1)]])
    location = (location.detach() * 1024).round() / 1024
    leaves = [each.detach().double().requires_grad_() for each in (features, location, weights)]
    return leaves[0], shape, start, leaves[1], leaves[2]


def test_exact_result_and_gradients(device):
    inputs = exactly_representable()
    expected = oracle(*inputs)
    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (inputs[0], inputs[3], inputs[4]), grad_output)
    features, shape, start, location, weights, grad_output = (
        each.detach().to(device) for each in (*inputs, grad_output)
    )
    for b in range(features.shape[0]):
        results = aggregation_oracle.exact(features[b], shape, start, location[b], weights[b], grad_output[b])
        for result, right in zip(results, (expected[b], *(gradient[b] for gradient in gradients)), strict=True):
            assert result.dtype == torch.float64
            torch.testing.assert_close(result.cpu(), right)


def test_exact_result_by_hand(device):
    features = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=device)  # a 2 x 2 map
    results = aggregation_oracle.exact(
        features,
        torch.tensor([[[2, 2]]], device=device),
        torch.tensor([[0]], device=device),
        torch.tensor([0.1, 0.5], device=device).view(1, 1, 1, 2),
        torch.full((1, 1, 1, 1, 1), 3.0, device=device),
        torch.full((1, 1), 10.0, device=device),
    )
    # u = -0.3: 0.7 of the left column's mean of 2; the float32 nearest to 0.1 is off by 1.5e-9.
    expected = [[4.2], [0.35 * 30, 0, 0.35 * 30, 0], [4.0 * 30, 2.8 * 30], [14.0]]
    for result, right in zip(results, expected, strict=True):
        assert result.flatten().tolist() == pytest.approx(right, rel=1e-6)


def test_exact_result_takes_the_side_that_float32_rounds_to(device):
    width = 176
    x = (torch.arange(width - 1) + 0.5) / width  # at the pixels
    below = (x.double() * width - 0.5 < torch.arange(width - 1)) & (x * width - 0.5 == torch.arange(width - 1))
    pixel = int(below.nonzero()[0])  # in float64 the point lies to the left of it
    features = torch.randn(width, 1, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, 1, 1, 1, device=device)
    location = torch.stack([x[pixel], torch.tensor(0.5)]).view(1, 1, 1, 2)
    shape, start = torch.tensor([[[1, width]]]), torch.tensor([[0]])
    inputs = (each.to(device) for each in (features, shape, start, location))
    result = aggregation_oracle.exact(*inputs, ones, ones.view(1, 1))
    assert result.grad_location[..., 0].item() == pytest.approx(
        width * (features[pixel + 1] - features[pixel]).item(), rel=1e-6
    )


def test_grid_sample_has_the_same_sums_away_from_the_border():
    features, shape, start, location, weights = make([[(8, 16), (4, 8)]] * 3)
    inputs = (features, shape, start, location.detach() * 0.7 + 0.15, weights)
    inputs = aggregation.AggregationInputs(*(each.detach() for each in inputs))
    inputs.sampling_location.clamp_(1e-3, 1 - 1e-3)
    maps = aggregation._channels_last(inputs)
    result = aggregation._grid_sample(inputs.sampling_location, inputs.weights, *maps)
    torch.testing.assert_close(result, saccade.deformable_aggregation(*inputs))
    assert torch.equal(aggregation._plain_rows(maps), inputs.feature_maps)


def exact_loss(element_losses, logits, target) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of all rows, and its gradient."""
    blocks = list(losses_oracle.exact(element_losses, logits, target))
    return sum(block.loss for block in blocks), torch.cat([block.grad_logits for block in blocks])


def test_exact_focal_losses_by_hand(device):
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]], device=device)
    target = torch.tensor([0, 3, 2], device=device)  # the second row is background
    loss, grad = exact_loss(losses_oracle.sigmoid_focal, logits, target)
    gradients = [-0.00121774, 0.03943585, 0.39461387, 0.00023615, 0.22371510, 0.57617604]
    gradients += [0.30468256, 0.06533225, -0.00000434]
    assert loss.item() == pytest.approx(1.1825912104, abs=5e-11)  # half of the last digit
    assert grad.flatten().tolist() == pytest.approx(gradients, abs=5e-9)

    p = torch.tensor([0.9, 0.2, 0.7, 0.05, 0.5], dtype=torch.float64, device=device)
    target = torch.tensor([1, 1, 0.6, 0, 0.95], dtype=torch.float64, device=device)
    loss, grad = exact_loss(losses_oracle.gaussian_focal, p.logit(), target)
    of_p = torch.tensor([-0.0321832142, -5.7751006599, 0.0849637186, 0.0077609084, 0.0000074572], dtype=torch.float64)
    # The values on paper are those of log(p + 1e-12), which changes none of their digits.
    assert loss.item() == pytest.approx(1.0463258203, abs=5e-11)
    torch.testing.assert_close(grad.cpu(), of_p * (p * (1 - p)).cpu(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", [losses.SIGMOID, losses.GAUSSIAN], ids=["sigmoid", "gaussian"])
def test_focal_losses_are_those_of_the_exact_ones_and_of_the_formulas(loss, device, monkeypatch):
    monkeypatch.setattr(losses_oracle, "BLOCK", 20)  # several blocks, the last of them not full
    if loss is losses.SIGMOID:
        logits, target = workloads.focal(50, 7, device=device)
    else:
        logits, target = workloads.gaussian_focal((5, 2, 6, 7), device=device)
    logits = logits.double()
    scale = 1 / logits.numel() if loss.is_mean else 1.0
    value, grad = (each * scale for each in exact_loss(loss.element_losses, logits, target))
    assert len(grad) == len(logits)
    torch.testing.assert_close(loss.call(logits, target), value)
    torch.testing.assert_close(loss.backward(torch.tensor(3.0, device=device).double(), logits, target), 3 * grad)
    leaf = logits.requires_grad_()
    by_formula = loss.formula(leaf, loss.formula_target(logits, target).double())
    by_formula.backward()
    torch.testing.assert_close(by_formula.detach(), value)
    torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("head", 0.1, 0.1),
        ("dense", 13, 27),
        ("dense-large", 73, 146),
        ("centerpoint", 1.2, 1.9),
        ("centernet", 80, 120),
    ],
)
def test_floors_of_the_focal_losses(name, forward, backward):
    """Those that the goals were set beside, in microseconds: they left out the labels, 2 / C of the logits."""
    labels_us = 0.0
    if name in losses.FOCAL:
        rows, classes = losses.FOCAL[name]
        logits, target = torch.empty(rows, classes, device="meta"), torch.empty(rows, dtype=torch.int64, device="meta")
        labels_us = rows * 8 / 4.2e6
    else:
        logits = target = torch.empty(losses.GAUSSIAN_FOCAL[name], device="meta")
    floors = losses.floors_us(logits, target)
    for kind, expected in (("forward", forward), ("backward", backward)):
        half_a_digit = 0.05 if expected < 10 else 0.5
        assert floors[kind] - labels_us == pytest.approx(expected, abs=half_a_digit)
    assert floors["forward+backward"] == floors["forward"] + floors["backward"]


# ---- what is timed, on small workloads of the CPU with clocks that only call


class Clock:
    """Stands in for the two clocks; knows whether it was used."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call, **_: int) -> float:
        self.calls += 1
        call()
        return 200.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The suites with tiny workloads, on a machine that claims to have an H200."""
    clock = Clock()
    tiny = {"batch": 2, "anchors": 20, "points": 2, "channels": 16, "groups": 2, "device": "cpu"}
    monkeypatch.setattr(aggregation, "AGGREGATION", {"tiny": tiny})
    monkeypatch.setattr(aggregation, "WORKLOADS", [("tiny", torch.float32), ("tiny", torch.bfloat16)])
    monkeypatch.setattr(aggregation, "MAPS_WORKLOAD", "tiny")
    monkeypatch.setattr(aggregation, "RECORDED_US", {"tiny": {"forward": 1000, "backward": 3000}})
    monkeypatch.setattr(losses, "FOCAL", {"head": (40, 5), "dense": (24, 8), "dense-large": (60, 8)})
    monkeypatch.setattr(losses, "PERMUTED_ROWS", (2, 3, 4))
    monkeypatch.setattr(losses, "GAUSSIAN_FOCAL", {"accvlab": (4, 8, 9), "centernet": (2, 3, 8, 8)})
    monkeypatch.setattr(losses, "focal", partial(workloads.focal, device="cpu"))
    monkeypatch.setattr(losses, "gaussian_focal_inputs", partial(workloads.gaussian_focal, device="cpu"))
    for suite in (aggregation, losses):
        monkeypatch.setattr(suite, "device_us", clock)
        monkeypatch.setattr(suite, "wall_us", clock)
        monkeypatch.setattr(suite, "memory_of", lambda *_: {"peak_mb": 110.0, "needed_mb": 100.0})
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "check", lambda *_: None)
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "0123456789abcdef"}
    monkeypatch.setattr(run, "_machine", lambda: machine)
    return clock


def test_records_and_tables(clock, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "aggregation", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {(record["workload"], record["pass"], record["dtype"], record["clock"]): record for record in records}
    clocks = {"forward": "device", "backward": "device", "backward-deterministic": "device", "forward+backward": "wall"}
    rows = [("aggregation/tiny", kind, dtype, clocks[kind]) for dtype in ("float32", "bfloat16") for kind in clocks]
    maps = [("aggregation-maps/tiny", kind, "float32", clocks[kind]) for kind in ("forward", "forward+backward")]
    assert list(found) == [*rows, *maps, ("feature_maps_format/tiny", "forward", "float32", "device")]
    for record in records:
        assert set(record) - {"peak_mb", "needed_mb"} == KEYS
        assert ("peak_mb" in record) == (record["clock"] == "wall")
        assert record["saccade_us"] == 200
        assert record["floor_us"] > 0
        assert 0 <= record["error"] <= accuracy.TOLERANCES[record["dtype"]]
    assert found[rows[0]]["recorded"] == {"original CUDA kernel": 1000}
    assert found[rows[1]]["recorded"] == {"original CUDA kernel": 3000}
    assert found[rows[0]]["baselines"] == {"grid_sample": 200}
    assert found[rows[3]]["baselines"] == {"grid_sample": 200, "grid_sample compiled": 200}
    assert found[rows[3]]["floor_us"] == found[rows[0]]["floor_us"] + found[rows[1]]["floor_us"]
    assert all(found[row]["baselines"] == found[row]["recorded"] == {} for row in rows[4:])
    assert found["feature_maps_format/tiny", "forward", "float32", "device"]["error"] == 0  # a copy
    assert "Device time" in result.output
    assert "Wall time" in result.output
    assert "5.0x" in result.output  # 1000 recorded over 200
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_records_of_the_losses(clock, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "losses", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {(record["workload"], record["dtype"], record["pass"], record["clock"]): record for record in records}
    assert len(found) == len(records)
    passes = [("forward", "device"), ("backward", "device"), ("forward+backward", "wall")]
    sigmoid = [(name, "float32") for name in ("head", "dense", "dense-large", "dense-permuted")]
    subjects = [(f"sigmoid_focal_loss/{name}", dtype) for name, dtype in (*sigmoid, ("dense-large", "bfloat16"))]
    subjects += [(f"gaussian_focal_loss/{name}", "float32") for name in ("accvlab", "centernet")]
    expected = {(*subject, *kind) for subject in subjects for kind in passes}
    head_on_the_wall = ("sigmoid_focal_loss/head", "float32", "forward", "wall")
    module = ("FocalLoss/head", "float32", "forward+backward", "wall")
    assert set(found) == expected | {head_on_the_wall, module}
    for (workload, dtype, kind, _), record in found.items():
        assert set(record) - {"peak_mb", "needed_mb"} == KEYS
        assert ("peak_mb" in record) == (kind == "forward+backward")
        assert record["saccade_us"] == 200
        assert record["floor_us"] > 0
        assert 0 < record["error"] <= accuracy.TOLERANCES["float32" if kind == "forward" else dtype]
        compared = set(record["baselines"])
        if dtype == "bfloat16" or workload.endswith("permuted") or kind == "backward":
            assert not compared
        elif workload.startswith("FocalLoss"):
            assert compared == {"torch BCE with logits"}
        elif workload.startswith("sigmoid"):
            assert compared == {"torchvision", "torchvision compiled"}
        else:
            assert compared == {"textbook", "textbook compiled"}
    recorded = {key: record["recorded"] for key, record in found.items() if record["recorded"]}
    assert {key: times["original CUDA kernel"] for key, times in recorded.items()} == {
        ("sigmoid_focal_loss/head", "float32", "forward", "device"): 13.0,
        ("sigmoid_focal_loss/head", "float32", "backward", "device"): 6.9,
        ("sigmoid_focal_loss/dense", "float32", "forward", "device"): 189,
        ("sigmoid_focal_loss/dense", "float32", "backward", "device"): 233,
        ("sigmoid_focal_loss/dense-large", "float32", "forward", "device"): 985,
        ("sigmoid_focal_loss/dense-large", "float32", "backward", "device"): 1245,
        module: 214,
    }
    assert "Device time" in result.output
    assert "Wall time" in result.output


def test_permuted_logits_are_those_of_the_dense_head(monkeypatch):
    batch, height, width = losses.PERMUTED_ROWS
    assert batch * height * width == losses.FOCAL[losses.PERMUTED_WORKLOAD][0]
    monkeypatch.setattr(losses, "PERMUTED_ROWS", (2, 3, 4))
    monkeypatch.setattr(losses, "FOCAL", {"dense": (24, 8)})
    monkeypatch.setattr(losses, "focal", partial(workloads.focal, device="cpu"))
    logits, target = losses._permuted()
    rows, labels = workloads.focal(24, 8, device="cpu")
    assert torch.equal(logits.flatten(0, 2), rows)
    assert torch.equal(target.flatten(), labels)
    assert logits.stride() == (8 * 3 * 4, 4, 1, 3 * 4)  # of an image, its classes lie one behind the other


@pytest.mark.parametrize(("suite", "count"), [("aggregation", 11), ("losses", 23)])
def test_quick_times_saccade_alone(clock, suite, count):
    records = run.run(suite, Console(quiet=True), quick=True)
    assert len(records) == clock.calls == count
    assert all(record["baselines"] == {} for record in records)


def test_one_workload_alone(clock):
    records = run.run("aggregation/tiny", Console(quiet=True), quick=True)
    assert {record["workload"] for record in records} == {"aggregation/tiny"}
    assert clock.calls == len(records)


def test_every_workload_has_a_name(clock):
    records = run.run(None, Console(quiet=True), quick=True)
    assert {record["workload"] for record in records} == {*aggregation.workloads(), *losses.workloads()}


def test_new_records_take_the_place_of_those_of_the_same_workload(clock, tmp_path):
    file = tmp_path / "results.json"
    arguments = ["bench", "--quick", "--json", str(file), "--only"]
    assert runner.invoke(app, [*arguments, "losses"]).exit_code == 0
    of_losses = json.loads(file.read_text())
    file.write_text(json.dumps([record | {"saccade_us": 1} for record in of_losses]))
    assert runner.invoke(app, [*arguments, "FocalLoss/head"]).exit_code == 0
    assert [record["saccade_us"] for record in json.loads(file.read_text()) if "FocalLoss" in record["workload"]] == [
        200
    ]
    assert runner.invoke(app, [*arguments, "aggregation"]).exit_code == 0
    both = json.loads(file.read_text())
    assert len(both) == len(of_losses) + 11


@pytest.mark.parametrize("content", [b"not JSON", b"{}", b"[1]", b'[{"workload": "x"}]', b"\xff\xfe"])
def test_a_file_of_something_else_is_not_written_over(content, clock, tmp_path):
    file = tmp_path / "results.json"
    file.write_bytes(content)
    result = runner.invoke(app, ["bench", "--quick", "--json", str(file)])
    assert result.exit_code == 2
    assert "holds something else than records" in result.stderr
    assert file.read_bytes() == content
    assert clock.calls == 0  # told before time is spent


def refused(clock, tmp_path, *arguments: str) -> str:
    """The complaint of a run that must time nothing and write nothing."""
    result = runner.invoke(app, ["bench", "--quick", "--json", str(tmp_path / "results.json"), *arguments])
    assert result.exit_code == 1, result.output
    assert clock.calls == 0
    assert not (tmp_path / "results.json").exists()
    assert result.stderr.startswith("saccade bench: ")
    return result.stderr


def test_an_operator_that_differs_from_its_reference_is_not_timed(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda *_: "differs from the reference")
    assert "deformable_aggregation is not timed: it differs from the reference" in refused(clock, tmp_path)
    monkeypatch.setattr(doctor, "check", lambda name, _: "raises" if name == "gaussian_focal_loss" else None)
    assert "gaussian_focal_loss is not timed: it raises" in refused(clock, tmp_path, "--only", "losses")


def test_a_wrong_result_is_not_timed(clock, tmp_path, monkeypatch):
    right = saccade.deformable_aggregation
    monkeypatch.setattr(saccade, "deformable_aggregation", lambda *inputs: right(*inputs) * 1.00001)
    message = refused(clock, tmp_path)
    assert "aggregation/tiny (float32) is not timed: forward has a relative error of 1.0e-05, allowed 2e-06" in message


def test_a_wrong_gradient_is_not_timed(clock, tmp_path, monkeypatch):
    reference = sys.modules["saccade.deformable_aggregation.reference"]
    right = reference.deformable_aggregation_backward

    def wrong_at_one_location(*inputs):
        features, location, weights = right(*inputs)
        location.flatten()[location.abs().argmax()] *= -1
        return features, location, weights

    monkeypatch.setattr(reference, "deformable_aggregation_backward", wrong_at_one_location)
    assert "is not timed: backward has a relative error of" in refused(clock, tmp_path)


def test_a_wrong_loss_is_not_timed(clock, tmp_path, monkeypatch):
    right = saccade.sigmoid_focal_loss
    monkeypatch.setattr(saccade, "sigmoid_focal_loss", lambda *inputs: right(*inputs) * 1.00001)
    message = refused(clock, tmp_path, "--only", "losses")
    assert "sigmoid_focal_loss/head (float32) is not timed: forward has a relative error of 1.0e-05" in message


def test_a_wrong_gradient_of_a_loss_is_not_timed(clock, tmp_path, monkeypatch):
    right = losses.SIGMOID.backward

    def without_the_last_row(grad_output, logits, target):
        grad = right(grad_output, logits, target)
        grad[-1] = 0
        return grad

    monkeypatch.setattr(losses, "SIGMOID", losses.SIGMOID._replace(backward=without_the_last_row))
    message = refused(clock, tmp_path, "--only", "losses")
    assert "sigmoid_focal_loss/head (float32) is not timed: backward has a relative error of" in message


def test_a_loss_of_bfloat16_logits_is_as_accurate_as_any_and_its_gradient_is_rounded():
    logits, target = workloads.focal(40, 5, device="cpu", dtype=torch.bfloat16)
    check = partial(losses.checked_errors, "a/b", losses.SIGMOID.element_losses, 1 / 200, logits, target)
    value = losses.SIGMOID.call(logits, target)
    grad = losses.SIGMOID.backward(torch.tensor(1.0), logits, target)
    assert grad.dtype == torch.bfloat16
    errors = check({"both": losses.Result(value, grad)})
    assert 1e-4 < errors["both"] <= accuracy.TOLERANCES["bfloat16"]
    assert check({"loss": losses.Result(value, None)})["loss"] <= accuracy.TOLERANCES["float32"]
    for result, allowed in (
        (losses.Result(value.bfloat16(), grad), "2e-06"),
        (losses.Result(value, grad * 1.01), "4e-03"),
        (losses.Result(value * float("nan"), grad), "2e-06"),
        (losses.Result(value, grad * float("nan")), "4e-03"),
    ):
        with pytest.raises(accuracy.WrongResultError, match=rf"a/b \(bfloat16\) is not timed: .* allowed {allowed}"):
            check({"both": result})


def test_a_deterministic_gradient_that_changes_is_not_timed(clock, tmp_path, monkeypatch):
    reference = sys.modules["saccade.deformable_aggregation.reference"]
    right = reference.deformable_aggregation_backward
    calls = []

    def another_rounding_every_time(*inputs):
        features, location, weights = right(*inputs)
        calls.append(None)
        return features * (1 + len(calls) * 2**-23), location, weights

    monkeypatch.setattr(reference, "deformable_aggregation_backward", another_rounding_every_time)
    assert "backward-deterministic differs from run to run" in refused(clock, tmp_path)


def test_an_error_that_is_no_number_is_refused():
    accuracy.require_accurate("aggregation/tiny", "float16", {"forward": 6e-4})
    for error in (6.1e-4, float("nan"), float("inf")):
        with pytest.raises(accuracy.WrongResultError, match="forward has a relative error"):
            accuracy.require_accurate("aggregation/tiny", "float16", {"forward": error})
    inputs = aggregation.AggregationInputs(*(each.detach() for each in make([[(8, 16), (4, 8)]])))
    output = saccade.deformable_aggregation(*inputs)
    results = {"forward": [output * float("nan"), None, None, None], "right": [output, None, None, None]}
    errors = aggregation.relative_errors(inputs, torch.ones_like(output), results)
    assert errors["right"] <= accuracy.TOLERANCES["float32"]
    assert not errors["forward"] <= 1


def test_an_unknown_suite_or_an_unwritable_file_is_one_line(clock, tmp_path):
    for arguments, message in (
        (
            ["--only", "nonsense"],
            "--only: expected one of aggregation, losses, or one of their workloads, got 'nonsense'",
        ),
        (["--json", str(tmp_path / "nowhere" / "results.json")], "cannot write this file"),
    ):
        result = runner.invoke(app, ["bench", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert clock.calls == 0


def test_help_tells_every_option():
    text = re.sub(r"\x1b\[[0-9;]*m", "", runner.invoke(app, ["bench", "--help"], terminal_width=200).output)
    for option in ("--only", "--quick", "--json"):
        assert option in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes times on a GPU")
def test_a_quick_run_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(aggregation, "WORKLOADS", [("det-b1", torch.float32)])
    monkeypatch.setattr(aggregation, "MAPS_WORKLOAD", "det-b1")
    monkeypatch.setattr(losses, "SIGMOID_WORKLOADS", [("head", torch.float32)])
    monkeypatch.setattr(losses, "GAUSSIAN_FOCAL", {"accvlab": losses.GAUSSIAN_FOCAL["accvlab"]})
    result = runner.invoke(app, ["bench", "--quick", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    assert {record["pass"] for record in records} == PASSES
    for record in records:
        assert record["saccade_us"] > 0
        assert record["gpu"] == torch.cuda.get_device_name()
        if record["pass"] == "forward+backward":  # inputs and results themselves are counted
            assert record["peak_mb"] > 0.99 * record["needed_mb"]


# ---- records as tables


def a_record(**values) -> dict:
    record = {"workload": "aggregation/det-b8", "pass": "forward", "dtype": "float32", "clock": "device"}
    record |= {"saccade_us": 150.4, "floor_us": 75.2, "baselines": {}, "recorded": {}, "error": 1.2e-6}
    return record | {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "commit": "a" * 40} | values


def test_markdown_of_records():
    records = [
        a_record(baselines={"grid_sample": 6000}, recorded={"old": 4325}),
        a_record(**{"pass": "backward", "saccade_us": 9.87, "error": None}),
        a_record(clock="wall", peak_mb=330.0, needed_mb=300.0, baselines={"compiled": 25611.4}),
    ]
    assert tables.markdown(records) == "\n".join(
        [
            f"Taken on NVIDIA H200, torch 2.11.0, Triton 3.6.0, commit `{'a' * 10}`.",
            "",
            "**Device time, microseconds**",
            "",
            "| workload | dtype | pass | saccade | floor | x floor | grid_sample | old (recorded) | speed-up | error |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| aggregation/det-b8 | float32 | forward | 150 | 75.2 | 2.0 | 6000 | 4325 | 28.8x | 1.2e-06 |",
            "| aggregation/det-b8 | float32 | backward | 9.9 | 75.2 | 0.1 |  |  |  |  |",
            "",
            "**Wall time, microseconds**",
            "",
            "| workload | dtype | pass | saccade | floor | x floor | compiled | error | peak MB | of needed |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| aggregation/det-b8 | float32 | forward | 150 | 75.2 | 2.0 | 25611 | 1.2e-06 | 330 | 1.10x |",
        ]
    )


def test_another_gpu_is_not_set_against_recorded_times():
    record = a_record(recorded={"old": 4325}, gpu="NVIDIA L4")
    assert "speed-up" not in [column.title for column in tables.columns([record])]


def test_a_page_gets_the_records_that_it_names():
    records = [a_record(), a_record(workload="losses/head")]
    page = tables.with_results("before\n\n<!-- results: losses -->\n\nafter", records)
    assert page.startswith("before\n\nTaken on")
    assert page.endswith("|\n\nafter")
    assert "losses/head" in page
    assert "aggregation" not in page
    with pytest.raises(ValueError, match=r"results: heatmap.*has no such record"):
        tables.with_results("<!-- results: heatmap -->", records)
    assert tables.on_page_markdown("no marker") == "no marker"


RESULTS = json.loads(tables.RESULTS.read_text())


def test_committed_results_are_records():
    keys = [(record["workload"], record["pass"], record["dtype"], record["clock"]) for record in RESULTS]
    assert len(set(keys)) == len(keys) > 0
    for record in RESULTS:
        assert set(record) >= KEYS
        assert record["pass"] in PASSES
        assert record["clock"] in tables.CLOCKS
        assert "H200" in record["gpu"]
        assert re.fullmatch("[0-9a-f]{40}", record["commit"])
        assert record["saccade_us"] > 0
        assert all(us > 0 for us in (*record["baselines"].values(), *record["recorded"].values()))
        assert record["error"] is None or record["error"] <= accuracy.TOLERANCES[record["dtype"]]


def test_the_documentation_shows_every_committed_result():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line for line in tables.on_page_markdown(page).splitlines() if re.match(r"\| [\w-]+/", line)]
    assert len(rows) == len(RESULTS)
    for record in RESULTS:
        start = f"| {record['workload']} | {record['dtype']} | {record['pass']} | "
        assert any(row.startswith(start) for row in rows)
    assert "tables.py" in (ROOT / "mkdocs.yml").read_text()


def test_the_readme_says_what_was_measured():
    aggregations = [record for record in RESULTS if record["workload"].startswith("aggregation/")]
    gains = [r["recorded"]["original CUDA kernel"] / r["saccade_us"] for r in aggregations if r["recorded"]]
    assert f"{int(min(gains))} to {int(max(gains))} times as fast" in " ".join((ROOT / "README.md").read_text().split())
