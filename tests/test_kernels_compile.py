"""Every kernel compiles for every GPU in the configurations that are launched, without spilling registers.

To cover a launcher, add a line to ``CASES``: a name, and a call of the launcher on small CPU tensors. The first case of
a launcher is compiled for all targets, the others for sm_90 alone. Have a case for each dtype, and for each channel
count that makes other constants (256, 128, 96, 60, 8, 1), of sizes that are divisible by 16 as those of real maps are:
wide loads are compiled only then. A kernel that is launched by nothing but a rare branch needs a case that takes it.
"""

import ast
import inspect
import re
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import saccade
from cases.deformable_aggregation import make
from saccade.triton_dispatch import served_by_triton

triton = pytest.importorskip("triton", reason="Triton is not installed")
if served_by_triton(torch.empty(0)):
    pytest.skip("under TRITON_INTERPRET kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kernel_launches import Launch, recorded_launches  # noqa: E402
from saccade.kernel_launch import LaunchedKernel  # noqa: E402

PACKAGE = Path(saccade.__file__).parent

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (90, 80, 86, 89, 100, 120)},
    **{"gfx90a": GPUTarget("hip", "gfx90a", 64), "gfx942": GPUTarget("hip", "gfx942", 64)},
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


def format_rows(*dtypes: torch.dtype, channels: int = 256, sizes: tuple[tuple[int, int], ...]) -> None:
    from saccade.deformable_aggregation.formatting_kernels import format_rows

    maps = [torch.empty(2, 6, channels, *size, dtype=d) for d, size in zip(dtypes, sizes, strict=True)]
    pixels = sum(height * width for height, width in sizes)
    format_rows(maps, torch.empty(2, 6, pixels, channels, dtype=dtypes[0]))


def aggregation(
    dtype: torch.dtype = torch.float32,
    channels: int = 256,
    groups: int = 8,
    location_dtype: torch.dtype | None = None,
    **options,
) -> list[torch.Tensor]:
    sizes = [[(16, 44), (8, 22), (4, 12), (4, 8)]] * 6
    inputs = make(sizes, **{"anchors": 16, "points": 13} | options, groups=groups, channels=channels)
    values = [value.detach().to(dtype) if value.is_floating_point() else value for value in inputs]
    values[3] = values[3].to(location_dtype or dtype)
    return values


def as_maps(features: torch.Tensor, spatial_shape: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the shapes that the levels of features would have as maps of their own."""
    areas = spatial_shape.prod(-1).sum(0).tolist()
    return [features.new_empty(features.shape[0], area, features.shape[2]) for area in areas]


def aggregate(*args, by_level: bool = False, **kwargs) -> None:
    from saccade.deformable_aggregation.kernels import deformable_aggregation

    features, spatial_shape, *rest = aggregation(*args, **kwargs)
    deformable_aggregation(as_maps(features, spatial_shape) if by_level else [features], spatial_shape, *rest)


def aggregate_backward(
    *args, needed: tuple[bool, bool, bool] = (True, True, True), by_level: bool = False, **kwargs
) -> None:
    from saccade.deformable_aggregation.backward_kernels import deformable_aggregation_backward

    features, spatial_shape, *rest = aggregation(*args, **kwargs)
    maps = as_maps(features, spatial_shape) if by_level else [features]
    grad_output = torch.empty(2, 16, features.shape[2]).to(features)
    deformable_aggregation_backward(grad_output, maps, spatial_shape, *rest, needed)


def aggregate_backward_counted_with_64_bits() -> None:
    from saccade.deformable_aggregation import backward_kernels

    with patch.object(backward_kernels, "_MOST_FOR_32_BITS", 0):
        aggregate_backward()
        aggregate_backward(by_level=True)


FPN = ((16, 44), (8, 22), (4, 12), (4, 8))
BLOCKS = ((512, 8), (256, 256), (128, 8), (96, 4), (60, 3), (8, 8), (1, 1))  # channels and groups
ODD = ((15, 25), (7, 13), (4, 7), (1, 1))


def sigmoid_focal(
    dtype: torch.dtype = torch.float32,
    classes: int = 80,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    kind: str = "mean",
    activated: bool = False,
    permuted: bool = False,
    target: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    avg_factor: torch.Tensor | None = None,
) -> None:
    from saccade.focal_loss.kernels import prepare_sigmoid_focal_loss, sigmoid_focal_loss_backward

    logits = torch.empty(ROWS, classes, dtype=dtype)
    if permuted:
        logits = torch.empty(ROWS // 512, classes, 32, 16, dtype=dtype).permute(0, 2, 3, 1)
    if target is None:
        target = torch.empty(logits.shape[:-1], dtype=torch.int64)
    rest = (logits, target, weight, class_weight, alpha, gamma, activated, kind, avg_factor, 1.0, 0.0)
    result = prepare_sigmoid_focal_loss(*rest)(*rest)
    sigmoid_focal_loss_backward(result, *rest, [True, weight is not None])
    if kind != "none":
        prepare_sigmoid_focal_loss(*rest, with_gradient=True)(*rest)


def softmax_focal(
    dtype: torch.dtype = torch.float32,
    classes: int = 80,
    *,
    gamma: float = 2.0,
    kind: str = "mean",
    class_weight: torch.Tensor | None = None,
) -> None:
    from saccade.focal_loss.softmax_kernels import softmax_focal_loss, softmax_focal_loss_backward

    logits, target = torch.empty(ROWS, classes, dtype=dtype), torch.empty(ROWS, dtype=torch.int64)
    rest = (logits, target, class_weight, 0.25, gamma, kind, None, 1.0, 0.0)
    softmax_focal_loss_backward(softmax_focal_loss(*rest), *rest)


def gaussian_focal(
    dtype: torch.dtype = torch.float32,
    *,
    target_dtype: torch.dtype = torch.float32,
    alpha: float = 2.0,
    gamma: float = 4.0,
    kind: str = "sum",
    with_logits: bool = True,
    clip: float | None = None,
    weight: torch.Tensor | None = None,
    channels_last: bool = False,
) -> None:
    from saccade.gaussian_focal_loss.kernels import gaussian_focal_loss, gaussian_focal_loss_backward

    pred, target = torch.empty(4, 16, 32, 32, dtype=dtype), torch.empty(4, 16, 32, 32, dtype=target_dtype)
    if channels_last:
        pred = pred.contiguous(memory_format=torch.channels_last)
    rest = (pred, target, weight, alpha, gamma, 1.0, 1.0, with_logits, clip)
    result, divisor = gaussian_focal_loss(*rest, kind, None, 1.0, 0.0)
    of_backward = ("mean", divisor) if kind == "num_pos" else (kind, None)
    gaussian_focal_loss_backward(result, *rest, *of_backward, 1.0, 0.0, [True, weight is not None])


def draw_heatmap(
    dtype: torch.dtype = torch.float32,
    *,
    size: tuple[int, int] = (20, 50),
    index_dtype: torch.dtype = torch.int32,
    ellipses: bool = False,
    k_scale: float = 1.0,
) -> None:
    from saccade.gaussian_heatmap.kernels import prepare_heatmap

    targets = [torch.empty(48, *rest, dtype=index_dtype) for rest in ((2,), (2,) if ellipses else (), ())]
    heatmap = torch.empty(3, *size, dtype=dtype, device="meta" if size[0] > 2**12 else "cpu")
    prepare_heatmap(heatmap, *targets, 6.0, k_scale, False)(heatmap, *targets)


def draw_heatmap_batched(
    dtype: torch.dtype = torch.float32,
    *,
    size: tuple[int, int] = (20, 50),
    classes: int | None = None,
    index_dtype: torch.dtype = torch.int32,
    ellipses: bool = False,
    clear: bool = False,
) -> None:
    from saccade.gaussian_heatmap.kernels import prepare_heatmap_batched

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=index_dtype)

    radii = integers(4, 50, 2) if ellipses else integers(4, 50)
    heatmap = torch.empty(4, *([] if classes is None else [classes]), *size, dtype=dtype)
    labels = None if classes is None else integers(4, 50)
    args = heatmap, integers(4, 50, 2), radii, integers(4), labels
    prepare_heatmap_batched(*args, 6.0, 1.0, clear)(*args)


def draw_boxes(
    dtype: torch.dtype = torch.float32,
    *,
    size: tuple[int, int] = (128, 128),
    classes: int | None = 10,
    corners: bool = True,
    convention: str = "mmdet",
) -> None:
    from saccade.gaussian_heatmap.kernels import draw_boxes

    heatmap = torch.empty(4, *([] if classes is None else [classes]), *size)
    labels = None if classes is None else torch.empty(4, 50, dtype=torch.int64)
    counts = torch.empty(4, dtype=torch.int64)
    of_boxes = corners, (0.0, 0.0), (4.0, 4.0), 0.3, convention, 0
    draw_boxes(heatmap, torch.empty(4, 50, 4, dtype=dtype), counts, labels, *of_boxes, 6.0, 1.0)


def ragged(
    dtype: torch.dtype = torch.float32,
    *data_dims: int,
    index_dtype: torch.dtype = torch.int64,
    filler: float = 0,
    numbers: bool = True,
) -> None:
    """Every launcher of ragged batches; ``numbers`` for dtypes that have a sum."""
    from saccade.ragged import kernels

    data, entries = torch.empty(48, 912, *data_dims, dtype=dtype), torch.empty(48, 48, *data_dims, dtype=dtype)
    index, sizes = torch.empty(48, 48, dtype=index_dtype), torch.empty(48, dtype=torch.int64)
    kernels.gather(data, index, sizes, filler)
    kernels.gather(data, index, sizes, 0, index, 912, last=True)
    kernels.put(data, entries, index, sizes, None, 0)
    kernels.put(data, entries, index, sizes, index, 912)
    kernels.spread(entries, index, sizes, None, 0, 912, filler)
    kernels.spread(entries, index, sizes, index, 912, 912, filler)
    kernels.transfer(data, entries, index, sizes, index)
    kernels.mark(index, sizes, 912)
    kernels.pad(entries.flatten(0, 1), sizes, sizes, 48)
    if numbers:
        kernels.prepare_sum(entries, index, sizes, 912)(entries, index, sizes, 912)


ROWS = 16384  # many enough elements for the tiles that large inputs have

CASES: list[tuple[str, Callable[[], object]]] = [
    ("sigmoid_focal/float32", sigmoid_focal),
    ("sigmoid_focal/float16", partial(sigmoid_focal, torch.float16)),
    ("sigmoid_focal/bfloat16", partial(sigmoid_focal, torch.bfloat16)),
    ("sigmoid_focal/float64", partial(sigmoid_focal, torch.float64)),
    *((f"sigmoid_focal/{classes}-classes", partial(sigmoid_focal, classes=classes)) for classes in (10, 1, 7, 256)),
    ("sigmoid_focal/few-rows", partial(sigmoid_focal, classes=10, avg_factor=torch.empty(1))),
    ("sigmoid_focal/permuted", partial(sigmoid_focal, permuted=True)),
    ("sigmoid_focal/unreduced", partial(sigmoid_focal, kind="none")),
    ("sigmoid_focal/permuted-unreduced", partial(sigmoid_focal, kind="none", permuted=True)),
    *((f"sigmoid_focal/gamma-{gamma}", partial(sigmoid_focal, gamma=gamma)) for gamma in (0.0, 1.5, 5.0)),
    ("sigmoid_focal/unbalanced", partial(sigmoid_focal, alpha=-1.0)),
    ("sigmoid_focal/int32", partial(sigmoid_focal, target=torch.empty(ROWS, dtype=torch.int32))),
    ("sigmoid_focal/soft", partial(sigmoid_focal, target=torch.empty(ROWS, 80))),
    ("sigmoid_focal/soft-1.5", partial(sigmoid_focal, gamma=1.5, target=torch.empty(ROWS, 80))),
    ("sigmoid_focal/bool", partial(sigmoid_focal, target=torch.empty(ROWS, 80, dtype=torch.bool))),
    ("sigmoid_focal/activated", partial(sigmoid_focal, activated=True)),
    ("sigmoid_focal/activated-1.5", partial(sigmoid_focal, activated=True, gamma=1.5)),
    ("sigmoid_focal/row-weight", partial(sigmoid_focal, weight=torch.empty(ROWS, 1))),
    ("sigmoid_focal/bool-weight", partial(sigmoid_focal, weight=torch.empty(ROWS, 80, dtype=torch.bool))),
    ("sigmoid_focal/class-weight", partial(sigmoid_focal, class_weight=torch.empty(80))),
    ("softmax_focal/float32", softmax_focal),
    ("softmax_focal/float16", partial(softmax_focal, torch.float16)),
    ("softmax_focal/bfloat16", partial(softmax_focal, torch.bfloat16)),
    ("softmax_focal/float64", partial(softmax_focal, torch.float64)),
    *((f"softmax_focal/{classes}-classes", partial(softmax_focal, classes=classes)) for classes in (10, 1, 3000)),
    ("softmax_focal/unreduced", partial(softmax_focal, kind="none", gamma=1.5, class_weight=torch.empty(80))),
    ("gaussian_focal/float32", gaussian_focal),
    ("gaussian_focal/float16", partial(gaussian_focal, torch.float16, target_dtype=torch.float16)),
    ("gaussian_focal/bfloat16", partial(gaussian_focal, torch.bfloat16)),
    ("gaussian_focal/float64", partial(gaussian_focal, torch.float64)),
    ("gaussian_focal/num-pos-clipped", partial(gaussian_focal, kind="num_pos", clip=1e-4)),
    ("gaussian_focal/unreduced", partial(gaussian_focal, kind="none")),
    ("gaussian_focal/other-powers", partial(gaussian_focal, alpha=1.5, gamma=3.5)),
    ("gaussian_focal/probabilities", partial(gaussian_focal, with_logits=False)),
    ("gaussian_focal/probabilities-other-powers", partial(gaussian_focal, with_logits=False, alpha=0.5, gamma=3.5)),
    ("gaussian_focal/weight", partial(gaussian_focal, weight=torch.empty(4, 1, 32, 32))),
    ("gaussian_focal/channels-last", partial(gaussian_focal, channels_last=True)),
    ("draw_heatmap/float32", draw_heatmap),
    ("draw_heatmap/float64-int64", partial(draw_heatmap, torch.float64, index_dtype=torch.int64)),
    ("draw_heatmap/medium", partial(draw_heatmap, size=(128, 128))),
    ("draw_heatmap/large", partial(draw_heatmap, size=(512, 512))),
    ("draw_heatmap/ellipses", partial(draw_heatmap, ellipses=True)),
    ("draw_heatmap/negative-scale", partial(draw_heatmap, k_scale=-1.0)),
    ("draw_heatmap/negative-scale-float64", partial(draw_heatmap, torch.float64, k_scale=-1.0)),
    ("draw_heatmap/64-bits", partial(draw_heatmap, size=(2**16, 2**15))),
    ("draw_heatmap_batched/float32", draw_heatmap_batched),
    ("draw_heatmap_batched/float64-large", partial(draw_heatmap_batched, torch.float64, size=(128, 128))),
    ("draw_heatmap_batched/classes", partial(draw_heatmap_batched, classes=20)),
    ("draw_heatmap_batched/classes-int64", partial(draw_heatmap_batched, classes=20, index_dtype=torch.int64)),
    ("draw_heatmap_batched/cleared", partial(draw_heatmap_batched, clear=True)),
    ("draw_heatmap_batched/cleared-large", partial(draw_heatmap_batched, size=(128, 128), classes=80, clear=True)),
    ("draw_heatmap_batched/ellipses", partial(draw_heatmap_batched, ellipses=True)),
    ("draw_heatmap_batched/cleared-odd", partial(draw_heatmap_batched, size=(5, 7), clear=True)),
    ("draw_heatmap_batched/cleared-float64", partial(draw_heatmap_batched, torch.float64, clear=True)),
    ("draw_boxes/float32", draw_boxes),
    ("draw_boxes/float16", partial(draw_boxes, torch.float16)),
    ("draw_boxes/bfloat16", partial(draw_boxes, torch.bfloat16)),
    ("draw_boxes/float64", partial(draw_boxes, torch.float64)),
    ("draw_boxes/centres", partial(draw_boxes, corners=False, convention="mmdet3d")),
    ("draw_boxes/small", partial(draw_boxes, size=(20, 50), classes=None)),
    ("ragged/float32", partial(ragged, torch.float32, 256)),
    ("ragged/float64", partial(ragged, torch.float64, 16)),
    ("ragged/float16", partial(ragged, torch.float16, 256, numbers=False)),
    ("ragged/bool", partial(ragged, torch.bool, numbers=False)),
    ("ragged/complex128", partial(ragged, torch.complex128, 11, filler=1j)),
    ("ragged/filler-1", partial(ragged, torch.int32, filler=1, numbers=False)),
    *((f"ragged/{inner}-inner", partial(ragged, torch.float32, inner, filler=-1.5)) for inner in (96, 11, 8, 1)),
    ("ragged/int32", partial(ragged, torch.float32, 11, index_dtype=torch.int32)),
    ("format_rows/float32", partial(format_rows, *[torch.float32] * 4, sizes=FPN)),
    ("format_rows/float16", partial(format_rows, *[torch.float16] * 4, sizes=FPN)),
    ("format_rows/bfloat16", partial(format_rows, *[torch.bfloat16] * 4, sizes=FPN)),
    ("format_rows/float64", partial(format_rows, *[torch.float64] * 4, sizes=FPN)),
    ("format_rows/mixed", partial(format_rows, *[torch.float32, torch.bfloat16] * 2, sizes=FPN)),
    ("format_rows/odd-sizes", partial(format_rows, *[torch.float32] * 4, sizes=ODD)),
    ("format_rows/odd-sizes-float16", partial(format_rows, *[torch.float16] * 4, sizes=ODD)),
    *(
        (f"format_rows/{channels}-channels", partial(format_rows, *[torch.float32] * 4, channels=channels, sizes=FPN))
        for channels in (128, 96, 60, 8, 1)
    ),
    ("aggregate/float32", aggregate),
    ("aggregate/float16", partial(aggregate, torch.float16)),
    ("aggregate/bfloat16", partial(aggregate, torch.bfloat16)),
    ("aggregate/float64", partial(aggregate, torch.float64)),
    ("aggregate/int32", partial(aggregate, index_dtype=torch.int32)),
    ("aggregate/maps", partial(aggregate, by_level=True)),
    ("aggregate/many-points", partial(aggregate, points=300)),
    ("aggregate/one-segment-float16", partial(aggregate, torch.float16, points=8)),
    ("aggregate/float64-locations", partial(aggregate, location_dtype=torch.float64)),
    *(
        (f"aggregate/{channels}-channels-{groups}-groups", partial(aggregate, torch.float32, channels, groups))
        for channels, groups in BLOCKS
    ),
    ("aggregate_backward/float32", aggregate_backward),
    ("aggregate_backward/float16", partial(aggregate_backward, torch.float16)),
    ("aggregate_backward/bfloat16", partial(aggregate_backward, torch.bfloat16)),
    ("aggregate_backward/float64", partial(aggregate_backward, torch.float64)),
    ("aggregate_backward/maps", partial(aggregate_backward, by_level=True)),
    ("aggregate_backward/64-bits", aggregate_backward_counted_with_64_bits),
    ("aggregate_backward/float64-locations", partial(aggregate_backward, location_dtype=torch.float64)),
    ("aggregate_backward/features", partial(aggregate_backward, needed=(True, False, False))),
    ("aggregate_backward/location", partial(aggregate_backward, needed=(False, True, False))),
    ("aggregate_backward/weights", partial(aggregate_backward, needed=(False, False, True))),
    *(
        (
            f"aggregate_backward/{channels}-channels-{groups}-groups",
            partial(aggregate_backward, torch.float32, channels, groups),
        )
        for channels, groups in BLOCKS
    ),
]


def launches_of(call: Callable[[], object]) -> list[Launch]:
    with recorded_launches() as launches:
        call()
    assert launches, "the launcher launched nothing"
    return launches


def compiled_cases() -> list:
    """Target and case: the first case of a launcher for every target, the others for sm_90."""
    chosen, seen = [], set()
    for name, call in CASES:
        launcher = name.split("/")[0]
        targets = ["sm_90"] if launcher in seen else TARGETS
        seen.add(launcher)
        chosen += [pytest.param(TARGETS[target], call, id=f"{target}-{name}") for target in targets]
    return chosen


def spilled(kernel, tmp_path: Path) -> int:
    """Bytes or registers that a compiled kernel keeps in local memory for want of registers."""
    if kernel.metadata.target.backend == "hip":
        counts = re.findall(
            r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)", kernel.asm["amdgcn"]
        )
        assert len(counts) == 3, "AMD's metadata has changed"
    else:
        (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [cuobjdump, "-res-usage", tmp_path / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        counts = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
        assert len(counts) == 2, f"cuobjdump says something else than before: {usage}"
    return sum(map(int, counts))


@pytest.mark.parametrize(("target", "call"), compiled_cases())
def test_compiles_without_spilling(target: GPUTarget, call: Callable[[], object], tmp_path: Path):
    for launch in launches_of(call):
        assert spilled(launch.compile(target), tmp_path) == 0, launch.name


def kernel_modules() -> list:
    paths = [*PACKAGE.rglob("kernels.py"), *PACKAGE.rglob("*_kernels.py")]
    return [import_module(".".join(["saccade", *path.relative_to(PACKAGE).with_suffix("").parts])) for path in paths]


def test_every_kernel_has_a_case():
    kernels = {
        f"{value.function.__module__}.{name}"
        for module in kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, LaunchedKernel)
    }
    assert kernels == {launch.name for _, call in CASES for launch in launches_of(call)}


def test_no_kernel_is_launched_past_its_launcher():
    """Every function of ``triton.jit`` is called by another one, or is a ``LaunchedKernel``."""
    found, called = set(), {"wait_for_kernel_before"}
    for module in kernel_modules():
        found |= {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
        calls = [node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
        called |= {call.id for call in calls if isinstance(call, ast.Name)}
    assert found <= called


def test_kernels_that_begin_early_wait_before_they_touch_memory():
    """A kernel that overlaps with the one before it and does not wait would read what is not written yet."""
    waiting = 0
    seen = set()
    for _, call in CASES:
        for number, launch in enumerate(launches_of(call)):
            # A kernel may be launched in several ways by a call: each of them once.
            if (launch.name, number) in seen:
                continue
            seen.add((launch.name, number))
            compiled = launch.compile(TARGETS["sm_90"])
            first_access = re.search(r"\b(?:ld|st|atom|red|cp\.async)\.\S*global", compiled.asm["ptx"])
            assert first_access, launch.name
            wait = compiled.asm["ptx"].find("griddepcontrol.wait")
            assert 0 <= wait < first_access.start() if compiled.metadata.launch_pdl else wait < 0, launch.name
            assert "griddepcontrol.launch_dependents" not in compiled.asm["ptx"], launch.name
            waiting += compiled.metadata.launch_pdl
    assert waiting > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_format_moves_16_bytes_at_a_time(dtype: torch.dtype):
    """Reads and writes of whole rows and pixels: narrower ones would be right, and slow."""
    (launch,) = launches_of(partial(format_rows, *[dtype] * 4, sizes=FPN))
    ptx = launch.compile(TARGETS["sm_90"]).asm["ptx"]
    assert set(re.findall(r"\b(?:ld|st)\.global\S*", ptx)) == {"ld.global.v4.b32", "st.global.v4.b32"}
