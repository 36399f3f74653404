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
from typing import Any
from unittest.mock import patch

import pytest
import torch

import saccade
from cases.deformable_aggregation import make
from saccade.triton_dispatch import served_by_triton

triton = pytest.importorskip("triton", reason="Triton is not installed")
if served_by_triton(torch.empty(0)):
    pytest.skip("under TRITON_INTERPRET kernels are interpreted, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402 - needs Triton
from triton.runtime.jit import JITFunction  # noqa: E402 - needs Triton

from kernel_launches import Launch, recorded_launches  # noqa: E402 - needs Triton
from saccade.operator.launch import LaunchedKernel  # noqa: E402 - needs Triton

PACKAGE = Path(saccade.__file__).parent

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (90, 80, 86, 89, 100, 120)},
    **{"gfx90a": GPUTarget("hip", "gfx90a", 64), "gfx942": GPUTarget("hip", "gfx942", 64)},
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


def launch(prepare: Callable[..., Any], *args: Any) -> Any:
    """What an operator does with its arguments on a GPU."""
    return prepare(*args)(*args)


def format_rows(*dtypes: torch.dtype, channels: int = 256, sizes: tuple[tuple[int, int], ...]) -> None:
    from saccade.deformable_aggregation.launch import prepare_format

    maps = [torch.empty(2, 6, channels, *size, dtype=d) for d, size in zip(dtypes, sizes, strict=True)]
    launch(prepare_format, len(maps), maps)


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


def aggregation_forward(*args, by_level: bool = False, **kwargs) -> None:
    from saccade.deformable_aggregation.launch import prepare_aggregation

    features, spatial_shape, *rest = aggregation(*args, **kwargs)
    maps = as_maps(features, spatial_shape) if by_level else [features]
    launch(prepare_aggregation, maps, spatial_shape, *rest)


def aggregation_backward(
    *args, needed: tuple[bool, bool, bool] = (True, True, True), by_level: bool = False, **kwargs
) -> None:
    from saccade.deformable_aggregation.launch import prepare_aggregation_backward

    features, spatial_shape, *rest = aggregation(*args, **kwargs)
    maps = as_maps(features, spatial_shape) if by_level else [features]
    grad_output = torch.empty(2, 16, features.shape[2]).to(features)
    launch(prepare_aggregation_backward, grad_output, maps, spatial_shape, *rest, needed)


def aggregation_backward_counted_with_64_bits() -> None:
    with patch("saccade.deformable_aggregation.launch._MOST_FOR_32_BITS", 0):
        aggregation_backward()
        aggregation_backward(by_level=True)


def aggregation_backward_of_many_rows() -> None:
    with patch("saccade.deformable_aggregation.launch._SCANNED", 2**20):
        aggregation_backward()
        aggregation_backward_counted_with_64_bits()


FPN = ((16, 44), (8, 22), (4, 12), (4, 8))
BLOCKS = ((512, 8), (256, 256), (128, 8), (96, 4), (60, 3), (8, 8), (1, 1))  # channels and groups
ODD = ((15, 25), (7, 13), (4, 7), (1, 1))


def sigmoid_focal(
    dtype: torch.dtype = torch.float32,
    classes: int = 80,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    mode: str = "mean",
    activated: bool = False,
    permuted: bool = False,
    target: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    avg_factor: torch.Tensor | None = None,
) -> None:
    from saccade.losses.focal import launch as focal
    from saccade.losses.focal.options import SigmoidOptions
    from saccade.losses.reduction import Reduction

    logits = torch.empty(ROWS, classes, dtype=dtype)
    if permuted:
        logits = torch.empty(ROWS // 512, classes, 32, 16, dtype=dtype).permute(0, 2, 3, 1)
    if target is None:
        target = torch.empty(logits.shape[:-1], dtype=torch.int64)
    options, reduction = SigmoidOptions(alpha, gamma, activated), Reduction(mode, avg_factor)
    args = logits, target, weight, class_weight, options, reduction
    result = launch(focal.prepare_sigmoid_focal_loss, *args)
    launch(focal.prepare_sigmoid_focal_loss_backward, result, *args, [True, weight is not None])
    if mode != "none":
        with patch.object(focal, "_FEW_TOGETHER", 2**62):
            together = focal.prepare_sigmoid_focal_loss_with_gradient(*args)
        if together is not None:  # halves have none
            together(*args)


def softmax_focal(
    dtype: torch.dtype = torch.float32,
    classes: int = 80,
    *,
    gamma: float = 2.0,
    mode: str = "mean",
    class_weight: torch.Tensor | None = None,
) -> None:
    from saccade.losses.focal import launch as focal
    from saccade.losses.reduction import Reduction

    logits, target = torch.empty(ROWS, classes, dtype=dtype), torch.empty(ROWS, dtype=torch.int64)
    args = logits, target, class_weight, 0.25, gamma, Reduction(mode)
    result = launch(focal.prepare_softmax_focal_loss, *args)
    launch(focal.prepare_softmax_focal_loss_backward, result, *args, [True])


def gaussian_focal(
    dtype: torch.dtype = torch.float32,
    *,
    target_dtype: torch.dtype = torch.float32,
    alpha: float = 2.0,
    gamma: float = 4.0,
    mode: str = "sum",
    with_logits: bool = True,
    clip: float | None = None,
    weight: torch.Tensor | None = None,
    channels_last: bool = False,
) -> None:
    from saccade.losses.gaussian import launch as gaussian
    from saccade.losses.gaussian.options import GaussianOptions
    from saccade.losses.reduction import Reduction

    pred, target = torch.empty(4, 16, 32, 32, dtype=dtype), torch.empty(4, 16, 32, 32, dtype=target_dtype)
    if channels_last:
        pred = pred.contiguous(memory_format=torch.channels_last)
    options = GaussianOptions(alpha, gamma, 1.0, 1.0, with_logits, clip)
    args = pred, target, weight, options
    result, count = launch(gaussian.prepare_gaussian_focal_loss, *args, Reduction(mode))
    if mode not in ("none", "num_pos"):
        together = gaussian.prepare_gaussian_focal_loss_with_gradient(*args, Reduction(mode))
        if together is not None:  # halves have none
            together(*args, Reduction(mode))
    of_backward = Reduction("mean", count) if mode == "num_pos" else Reduction(mode)
    launch(gaussian.prepare_gaussian_focal_loss_backward, result, *args, of_backward, [True, weight is not None])


def draw_heatmap(
    dtype: torch.dtype = torch.float32,
    *,
    size: tuple[int, int] = (20, 50),
    index_dtype: torch.dtype = torch.int32,
    ellipses: bool = False,
    k_scale: float = 1.0,
) -> None:
    from saccade.gaussian_heatmap.launch import prepare_heatmap

    targets = [torch.empty(48, *rest, dtype=index_dtype) for rest in ((2,), (2,) if ellipses else (), ())]
    heatmap = torch.empty(3, *size, dtype=dtype, device="meta" if size[0] > 2**12 else "cpu")
    launch(prepare_heatmap, heatmap, *targets, 6.0, k_scale, False)


def draw_heatmap_batched(
    dtype: torch.dtype = torch.float32,
    *,
    size: tuple[int, int] = (20, 50),
    classes: int | None = None,
    index_dtype: torch.dtype = torch.int32,
    ellipses: bool = False,
    clear: bool = False,
) -> None:
    from saccade.gaussian_heatmap.launch import prepare_heatmap_batched

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=index_dtype)

    radii = integers(4, 50, 2) if ellipses else integers(4, 50)
    heatmap = torch.empty(4, *([] if classes is None else [classes]), *size, dtype=dtype)
    labels = None if classes is None else integers(4, 50)
    args = heatmap, integers(4, 50, 2), radii, integers(4), labels
    launch(prepare_heatmap_batched, *args, 6.0, 1.0, clear)


def draw_boxes(
    dtype: torch.dtype = torch.float32,
    *,
    size: tuple[int, int] = (128, 128),
    classes: int | None = 10,
    corners: bool = True,
    convention: str = "mmdet",
) -> None:
    from saccade.gaussian_heatmap.launch import prepare_boxes_to_heatmap
    from saccade.gaussian_heatmap.options import BoxOptions

    labels = None if classes is None else torch.empty(4, 50, dtype=torch.int64)
    options = BoxOptions((4.0, 4.0), 0.3, convention, 0, "xyxy" if corners else "cxcywh", (0.0, 0.0))
    boxes, counts = torch.empty(4, 50, 4, dtype=dtype), torch.empty(4, dtype=torch.int64)
    launch(prepare_boxes_to_heatmap, boxes, counts, labels, size, classes, 6.0, 1.0, options)


def ragged(
    dtype: torch.dtype = torch.float32,
    *data_dims: int,
    index_dtype: torch.dtype = torch.int64,
    filler: float = 0,
    numbers: bool = True,
) -> None:
    """Every launcher of ragged batches; ``numbers`` for dtypes that have a sum."""
    from saccade.ragged import launch

    def launched(operator: str, *args: Any) -> None:
        getattr(launch, f"prepare_{operator}")(*args)(*args)

    data, entries = torch.empty(48, 912, *data_dims, dtype=dtype), torch.empty(48, 48, *data_dims, dtype=dtype)
    index, sizes = torch.empty(48, 48, dtype=index_dtype), torch.empty(48, dtype=torch.int64)
    launched("gather", data, index, sizes, filler)
    launched("take", data, index, sizes, index, 912)
    launched("put", data, entries, index, sizes, None, 0)
    launched("put", data, entries, index, sizes, index, 912)
    launched("spread", entries, index, sizes, None, 0, 912, filler)
    launched("spread", entries, index, sizes, index, 912, 912, filler)
    launched("transfer", data, entries, index, sizes, index)
    launched("mark", index, sizes, 912)
    launched("pad", entries.flatten(0, 1), sizes, sizes, 48)
    if numbers:
        launched("sum", entries, index, sizes, 912)


ROWS = 16384  # many enough elements for the tiles that large inputs have

CASES: list[tuple[str, Callable[[], object]]] = [
    ("sigmoid_focal/float32", sigmoid_focal),
    ("sigmoid_focal/float16", partial(sigmoid_focal, torch.float16)),
    ("sigmoid_focal/bfloat16", partial(sigmoid_focal, torch.bfloat16)),
    ("sigmoid_focal/float64", partial(sigmoid_focal, torch.float64)),
    *((f"sigmoid_focal/{classes}-classes", partial(sigmoid_focal, classes=classes)) for classes in (10, 1, 7, 256)),
    ("sigmoid_focal/few-rows", partial(sigmoid_focal, classes=10, avg_factor=torch.empty(1))),
    ("sigmoid_focal/permuted", partial(sigmoid_focal, permuted=True)),
    ("sigmoid_focal/unreduced", partial(sigmoid_focal, mode="none")),
    ("sigmoid_focal/permuted-unreduced", partial(sigmoid_focal, mode="none", permuted=True)),
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
    ("softmax_focal/unreduced", partial(softmax_focal, mode="none", gamma=1.5, class_weight=torch.empty(80))),
    ("gaussian_focal/float32", gaussian_focal),
    ("gaussian_focal/float16", partial(gaussian_focal, torch.float16, target_dtype=torch.float16)),
    ("gaussian_focal/bfloat16", partial(gaussian_focal, torch.bfloat16)),
    ("gaussian_focal/float64", partial(gaussian_focal, torch.float64)),
    ("gaussian_focal/num-pos-clipped", partial(gaussian_focal, mode="num_pos", clip=1e-4)),
    ("gaussian_focal/unreduced", partial(gaussian_focal, mode="none")),
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
    ("aggregate/float32", aggregation_forward),
    ("aggregate/float16", partial(aggregation_forward, torch.float16)),
    ("aggregate/bfloat16", partial(aggregation_forward, torch.bfloat16)),
    ("aggregate/float64", partial(aggregation_forward, torch.float64)),
    ("aggregate/int32", partial(aggregation_forward, index_dtype=torch.int32)),
    ("aggregate/maps", partial(aggregation_forward, by_level=True)),
    ("aggregate/many-points", partial(aggregation_forward, points=300)),
    ("aggregate/one-segment-float16", partial(aggregation_forward, torch.float16, points=8)),
    ("aggregate/float64-locations", partial(aggregation_forward, location_dtype=torch.float64)),
    *(
        (
            f"aggregate/{channels}-channels-{groups}-groups",
            partial(aggregation_forward, torch.float32, channels, groups),
        )
        for channels, groups in BLOCKS
    ),
    ("aggregate_backward/float32", aggregation_backward),
    ("aggregate_backward/float16", partial(aggregation_backward, torch.float16)),
    ("aggregate_backward/bfloat16", partial(aggregation_backward, torch.bfloat16)),
    ("aggregate_backward/float64", partial(aggregation_backward, torch.float64)),
    ("aggregate_backward/maps", partial(aggregation_backward, by_level=True)),
    ("aggregate_backward/64-bits", aggregation_backward_counted_with_64_bits),
    ("aggregate_backward/many-rows", aggregation_backward_of_many_rows),
    ("aggregate_backward/float64-locations", partial(aggregation_backward, location_dtype=torch.float64)),
    ("aggregate_backward/features", partial(aggregation_backward, needed=(False, False, True))),
    ("aggregate_backward/location", partial(aggregation_backward, needed=(True, False, False))),
    ("aggregate_backward/weights", partial(aggregation_backward, needed=(False, True, False))),
    *(
        (
            f"aggregate_backward/{channels}-channels-{groups}-groups",
            partial(aggregation_backward, torch.float32, channels, groups),
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
    found, called = set(), {"wait_for_previous_kernel"}
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
