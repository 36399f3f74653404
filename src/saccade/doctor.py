"""``saccade doctor``: does this installation work? Needs torch alone."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

import saccade
from saccade.operator.torch_internals import fast_paths_off
from saccade.triton_dispatch import triton_is_installed

# Relative error (norm) that a float32 result may have against the float64 reference. A wrong kernel is off by far more.
TOLERANCE = 1e-5

_FOLDERS = {"focal_loss": "losses.focal", "gaussian_focal_loss": "losses.gaussian"}
"""Where operators are that have not a folder of their own name."""


def backend(operator: str, device_type: str) -> str:
    """What computes an operator on a kind of device: ``"triton"`` or ``"pytorch"``.

    Args:
        operator: One of ``CHECKS``, such as ``"deformable_aggregation"``.
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    has_kernels = importlib.util.find_spec(f"saccade.{_FOLDERS.get(operator, operator)}.kernels") is not None
    return "triton" if device_type == "cuda" and has_kernels and triton_is_installed() else "pytorch"


def _inputs(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A source of the same random numbers for every device and dtype."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int, requires_grad: bool = False) -> Tensor:
        numbers = torch.rand(shape, generator=rng, dtype=torch.float64).to(torch.float32)
        return numbers.to(device, dtype).requires_grad_(requires_grad)

    return random


def _with_gradients(result: Tensor, *leaves: Tensor) -> list[Tensor]:
    slope = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).view(result.shape)
    return [result, *torch.autograd.grad(result, leaves, slope.to(result))]


def _deformable_aggregation(device: str, dtype: torch.dtype) -> list[Tensor]:
    random = _inputs(device, dtype)
    maps = [random(2, 3, 16, *size, requires_grad=True) for size in ((8, 12), (4, 6))]
    location = (random(2, 20, 5, 3, 2) * 1.4 - 0.2).detach().requires_grad_()
    weights = random(2, 20, 5, 3, 2, 4, requires_grad=True)
    rows, spatial_shape, scale_start_index = saccade.feature_maps_format(maps)
    result = saccade.deformable_aggregation(rows, spatial_shape, scale_start_index, location, weights)
    results = _with_gradients(result, *maps, location, weights)
    channels_last = [
        m.detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).requires_grad_() for m in maps
    ]
    in_place = saccade.deformable_aggregation(channels_last, None, None, location, weights)
    return [*results, *_with_gradients(in_place, *channels_last, location, weights)]


def _focal_loss(device: str, dtype: torch.dtype) -> list[Tensor]:
    logits = (_inputs(device, dtype)(50, 7) * 8 - 4).requires_grad_()
    target = torch.arange(50, device=device) % 9 - 1
    sigmoid = saccade.sigmoid_focal_loss(logits, target, reduction="sum")
    softmax = saccade.softmax_focal_loss(logits, target, reduction="sum")
    return [*_with_gradients(sigmoid, logits), *_with_gradients(softmax, logits)]


def _gaussian_focal_loss(device: str, dtype: torch.dtype) -> list[Tensor]:
    random = _inputs(device, dtype)
    logits = (random(2, 3, 8, 8) * 8 - 4).requires_grad_()
    target = random(2, 3, 8, 8) ** 4
    target[..., 2, 3] = 1
    from_logits = saccade.gaussian_focal_loss_with_logits(logits, target, avg_factor="num_pos")
    from_probabilities = saccade.gaussian_focal_loss(logits.sigmoid(), target, reduction="sum")
    return [*_with_gradients(from_logits, logits), *_with_gradients(from_probabilities, logits)]


def _gaussian_heatmap(device: str, dtype: torch.dtype) -> list[Tensor]:
    heatmap = torch.zeros(2, 3, 16, 24, device=device, dtype=dtype)
    centers = torch.tensor([[[5, 4], [6, 5], [23, 15]], [[0, 0], [12, 8], [99, 99]]], device=device)
    radii = torch.tensor([[2, 3, 4], [0, 6, 1]], device=device)
    labels = torch.tensor([[0, 0, 1], [2, 1, 0]], device=device)
    counts = torch.tensor([3, 2], device=device)
    saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=counts)
    flat = torch.zeros(2, 16, 24, device=device, dtype=dtype)
    saccade.draw_heatmap(flat, centers[0], radii[0], labels[0])
    ellipses = torch.stack([radii, radii.flip(-1)], -1)
    targets = saccade.heatmap_targets(centers, ellipses, (16, 24), counts=counts)
    boxes = torch.cat([centers - 1.5, centers + torch.tensor([2.5, 3.0], device=device)], -1).to(dtype)
    of_boxes = saccade.boxes_to_heatmap(boxes, labels, (16, 24), 1, 0.3, "mmdet", num_classes=3, counts=counts)
    return [heatmap, flat, targets, of_boxes]


def _ragged(device: str, dtype: torch.dtype) -> list[Tensor]:
    random = _inputs(device, dtype)
    data, entries = random(2, 5, 3, requires_grad=True), random(2, 4, 3, requires_grad=True)
    sizes = torch.tensor([4, 2], device=device)
    index = saccade.RaggedBatch(torch.tensor([[3, 0, -1, 1], [2, 4, 9, 9]], device=device), sample_sizes=sizes)
    repeated = saccade.RaggedBatch(torch.tensor([[1, 1, 0, 1], [2, 2, 9, 9]], device=device), sample_sizes=sizes)
    picked = saccade.ragged.batched_indexing_access(data, repeated).tensor
    spread = saccade.ragged.batched_inverse_indexing_access(entries, index, 6)
    written = saccade.ragged.batched_indexing_write(entries, index, data)
    mapped = saccade.ragged.batched_index_mapping(entries, repeated, index, data)
    mask = saccade.ragged.get_mask_from_indices(5, index)
    combined = saccade.ragged.combine_data([data[0], data[1, :2]]).tensor
    results = [_with_gradients(picked, data), _with_gradients(spread, entries), _with_gradients(combined, data)]
    for result in written, mapped:
        assert isinstance(result, Tensor)  # as the data are
        results.append(_with_gradients(result, data, entries))
    return [tensor for result in results for tensor in result] + [mask.to(dtype)]


CHECKS: dict[str, Callable[[str, torch.dtype], list[Tensor]]] = {
    "deformable_aggregation": _deformable_aggregation,
    "focal_loss": _focal_loss,
    "gaussian_focal_loss": _gaussian_focal_loss,
    "gaussian_heatmap": _gaussian_heatmap,
    "ragged": _ragged,
}


def check(operator: str, device: str) -> str | None:
    """Compare an operator on a device, in float32, with its float64 reference; ``None``, or what is wrong."""
    try:
        expected = CHECKS[operator]("cpu", torch.float64)
        results = CHECKS[operator](device, torch.float32)
    except Exception as error:  # whatever goes wrong here is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for result, reference in zip(results, expected, strict=True):
        error = ((result.double().cpu() - reference).norm() / reference.norm()).item()
        if not error <= TOLERANCE:
            return f"differs from the reference: relative error {error:.1e}, allowed {TOLERANCE:.0e}"
    return None


def _wait_for_autograd(device: str) -> None:
    """Wait until autograd's own thread has let go of the gradients that it computed on a GPU.

    It does so after it has handed over their results, and if Python ends before that, it may abort: 1 of 56 runs on a
    busy machine did, after the last line of their report.
    """
    with suppress(RuntimeError):  # of a GPU that has failed, which was reported
        torch.ones((), device=device, requires_grad=True).clone().backward()


def _triton(has_gpu: bool) -> str:
    """Version of Triton; on a machine with a GPU also what its absence means."""
    if not triton_is_installed():
        return "not installed" + ("; every operator runs in plain PyTorch (pip install triton)" if has_gpu else "")
    for distribution in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "of an unknown version"


def _toolchain() -> list[tuple[str, str]]:
    """C compiler and Python headers, which Triton needs at its first launch on a machine."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return [
        (
            "C compiler",
            compiler or "none; Triton needs one at its first launch (Debian: apt-get install gcc)",
        ),
        (
            "Python headers",
            str(header.parent)
            if header.exists()
            else "none; Triton needs them at its first launch (Debian: apt-get install python3-dev)",
        ),
    ]


def main(argv: list[str]) -> int:
    """Print the report; 0 if every operator agrees with its reference on every device, else 1."""
    parser = argparse.ArgumentParser(
        prog="saccade doctor",
        description="Check the installation: versions, devices, each operator against its reference on every device.",
    )
    parser.parse_args(argv)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    lines = [
        ("saccade", saccade.__version__),
        ("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA")),
        ("triton", _triton(bool(gpus))),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu", f"{torch.get_num_threads()} threads"),
        *((gpu, torch.cuda.get_device_name(gpu)) for gpu in gpus),
        *([] if gpus else [("GPU", "none that torch can use; every operator runs on the CPU")]),
        *_toolchain(),
    ]
    for name, value in lines:
        print(f"{name:<16}{value}")
    print(f"\n{'operator':<26}{'device':<10}{'backend':<10}result")
    failed = 0
    for operator in CHECKS:
        for device in ["cpu", *gpus]:
            fault = check(operator, device)
            failed += fault is not None
            print(f"{operator:<26}{device:<10}{backend(operator, device.split(':')[0]):<10}{fault or 'ok'}")
    # After the checks, as a launcher is looked at when a kernel is launched.
    off = [*fast_paths_off()]
    print("\nfast paths: all on" if not off else "")
    for path, why in off:
        print(f"fast path off: {path.name}, as {why}; {path.without}")
    for gpu in gpus:
        _wait_for_autograd(gpu)
    if failed:
        print(f"\n{failed} of {len(CHECKS) * (1 + len(gpus))} checks failed")
    return 1 if failed else 0
