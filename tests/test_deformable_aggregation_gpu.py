"""``deformable_aggregation`` on a GPU: accuracy at real sizes, large batches, maps out of place, needed gradients.

What it has in common with other operators is in ``test_gpu_contract.py``.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import saccade
from benchmarks.aggregation_oracle import exact
from benchmarks.workloads import aggregation
from cases.comparison import assert_near
from cases.deformable_aggregation import RIG, make, oracle
from cases.on_gpu import DEVICE, bytes_of, step
from cases.on_gpu.deformable_aggregation import CONFIGS, FORMS, TOLERANCES, in_form, rows_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def assert_near_exact(inputs: Sequence[Tensor], grad_output: Tensor, results: Sequence[Tensor], **loose: float) -> None:
    """Every sample of a step's results against the exact ones; ``loose`` has a tolerance other than the usual."""
    features, shape, start, location, weights = inputs
    output, *grad_features, grad_location, grad_weights = results
    actual = (output, rows_of(grad_features), grad_location, grad_weights)
    for b in range(features.shape[0]):
        expected = exact(features[b], shape, start, location[b], weights[b], grad_output[b].to(features.dtype))
        for name, left, right in zip(expected._fields, actual, expected, strict=True):
            assert_near(f"{name} of sample {b}", left[b], right, loose.get(name, TOLERANCES[left.dtype]))


# ---- accuracy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy_at_real_size(form, config, dtype):
    inputs = aggregation(2, *CONFIGS[config], device=DEVICE, dtype=dtype)
    call, values = in_form(form, inputs)
    grad_output = torch.randn(2, CONFIGS[config][0], 256, device=DEVICE)
    assert_near_exact(inputs, grad_output, step(call, values, grad_output))


def on_one_pixel(batch: int) -> Sequence[Tensor]:
    """The detector's inputs, every point of which lies at one and the same place of every camera."""
    inputs = aggregation(batch, *CONFIGS["det"], device=DEVICE)
    inputs.sampling_location.fill_(0.37)
    return inputs


@pytest.mark.parametrize("form", FORMS)
def test_accuracy_with_thousands_of_points_on_one_pixel(form):
    inputs = on_one_pixel(1)
    call, values = in_form(form, inputs)
    grad_output = torch.randn(1, 900, 256, device=DEVICE)
    # The gradient of a pixel is a sum of 11700 terms of either sign, one after another: the rounding errors of the
    # partial sums add up to about 6e-8 * 0.3 * sqrt(11700 / 2) of it, 1.4e-6, and more if they are not random.
    assert_near_exact(inputs, grad_output, step(call, values, grad_output), grad_features=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("config", "batch", "dtype"),
    [
        pytest.param("det", 128, torch.bfloat16, id="det-b128", marks=pytest.mark.gpu_memory(60)),
        pytest.param("map", 16, torch.float32, id="map-b16", marks=pytest.mark.gpu_memory(20)),
    ],
)
def test_the_last_sample_of_a_large_batch_is_as_it_is_alone(form, config, batch, dtype):
    features, shape, start, location, weights = aggregation(batch, *CONFIGS[config], device=DEVICE, dtype=dtype)
    grad_output = torch.randn(batch, CONFIGS[config][0], 256, device=DEVICE)
    call, values = in_form(form, (features[-1:], shape, start, location[-1:], weights[-1:]))
    alone = step(call, values, grad_output[-1:])
    del call, values
    call, values = in_form(form, (features, shape, start, location, weights))
    del features  # in the form of maps there are two of them
    results = [result[-1:].clone() for result in step(call, values, grad_output)]
    # A larger batch may share out the work, and with it the order of sums, in another way.
    for k, (left, right) in enumerate(zip(results, alone, strict=True)):
        assert_near(f"result {k}", left, right, TOLERANCES[left.dtype])


# ---- maps that are not where they should be

# First row, height and width of the last map of the rig, whose 120 rows it takes from 108 to 119, instead.
BAD_MAPS = {
    "begins-one-row-early": (-1, 3, 4),
    "begins-before-all-rows": (-12, 3, 4),
    "ends-one-row-late": (109, 3, 4),
    "begins-in-the-last-row": (119, 3, 4),
    "begins-after-all-rows": (120, 3, 4),
    "taller-than-all-rows": (0, 31, 4),
    "wider-than-all-rows": (0, 3, 100),
    "begins-at-the-last-of-32-bits": (2**31 - 1, 3, 4),
    "begins-at-the-first-of-32-bits": (-(2**31), 3, 4),
    "begins-beyond-32-bits": (2**40, 3, 4),
    "begins-far-before-32-bits": (-(2**40), 3, 4),
    "begins-where-32-bits-wrap": (2**32 + 108, 3, 4),
    "begins-at-the-last-of-64-bits": (2**63 - 1, 3, 4),
    "begins-at-the-first-of-64-bits": (-(2**63), 3, 4),
    "height-of-32-bits": (108, 2**31 - 1, 4),
    "width-of-32-bits": (108, 3, 2**31 - 1),
    "height-beyond-32-bits": (108, 2**40, 4),
    "width-beyond-32-bits": (108, 3, 2**40),
    "size-where-32-bits-wrap": (108, 2**32 + 3, 2**32 + 4),
    "area-beyond-64-bits": (108, 2**62, 2**62),
}
EMPTY_MAPS = {  # which is no fault
    "no-height": (108, 0, 4),
    "no-width": (108, 3, 0),
    "negative-height": (108, -3, 4),
    "negative-width": (108, 3, -4),
    "negative-sides": (108, -3, -4),
    "no-height-far-away": (2**40, 0, 2**40),
}


@pytest.mark.parametrize("name", [*BAD_MAPS, *EMPTY_MAPS])
def test_maps_that_reach_outside_the_features(name):
    """Rows that do not exist count as zero, corner by corner, and nothing is written for them."""
    begin, height, width = (BAD_MAPS | EMPTY_MAPS)[name]
    features, shape, start, location, weights = make(RIG, batch=1, anchors=6)
    shape[1, 1], start[1, 1] = torch.tensor([height, width]), begin
    leaves = [value.detach().double().requires_grad_() for value in (features, location, weights)]
    grad_output = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    output = oracle(leaves[0], shape, start, *leaves[1:])
    expected = [output, *torch.autograd.grad(output, leaves, grad_output.double())]
    fits = torch.iinfo(torch.int32)
    for index in (torch.int64, torch.int32):
        if index == torch.int32 and not all(fits.min <= value <= fits.max for value in (begin, height, width)):
            continue
        for dtype in (torch.float32, torch.float64):
            values = [leaf.detach().to(DEVICE, dtype) for leaf in leaves]
            indices = shape.to(DEVICE, index), start.to(DEVICE, index)
            call, values = in_form("rows", (values[0], *indices, *values[1:]))
            with saccade.debug_checks(False):
                results = step(call, values, grad_output.to(DEVICE))
            for k, (left, right) in enumerate(zip(results, expected, strict=True)):
                assert_near(f"result {k}, {dtype}, {index}", left, right, TOLERANCES[dtype])
            with saccade.debug_checks(True):
                if name in BAD_MAPS:
                    with pytest.raises(ValueError, match=r"camera 1, level 1"):
                        call(*values)
                else:
                    assert torch.equal(call(*values), results[0])


# ---- memory


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
def test_only_the_gradients_that_are_needed(needed):
    inputs = aggregation(8, *CONFIGS["det"], device=DEVICE)
    grad_output = torch.randn(8, 900, 256, device=DEVICE)
    call, values = in_form("rows", inputs)
    _, *expected = step(call, values, grad_output)
    leaves = [value for value in values if value.requires_grad]
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(need)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call(*values)
    gradients = torch.autograd.grad(output, wanted, grad_output)
    beside = torch.cuda.max_memory_allocated() - before - bytes_of(output, *gradients)
    assert beside < bytes_of(values[0]) / 2  # neither a copy of the features nor a gradient of them
    asked = [gradient for gradient, need in zip(expected, needed, strict=True) if need]
    for k, (left, right) in enumerate(zip(gradients, asked, strict=True)):
        # A kernel that computes less is another kernel: the compiler may fuse other products and sums.
        assert_near(f"gradient {k}", left, right, TOLERANCES[torch.float32])
