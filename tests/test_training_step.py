"""All operators in one training step: eager, compiled, captured in a CUDA graph, on another stream and device."""

import pytest
import torch
from torch import Tensor

import saccade

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def make_inputs(device: str, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    inputs = {
        "fine": torch.randn(2, 3, 8, 8, 12, generator=rng),
        "coarse": torch.randn(2, 3, 8, 4, 6, generator=rng),
        "location": torch.rand(2, 6, 4, 3, 2, generator=rng) * 1.2 - 0.1,
        "weights": torch.randn(2, 6, 4, 3, 2, 2, generator=rng),
        "centers": torch.randint(-1, 13, (2, 5, 2), generator=rng),
        "radii": torch.randint(0, 4, (2, 5), generator=rng),
        "labels": torch.randint(0, 8, (2, 5), generator=rng),
        "counts": torch.randint(1, 6, (2,), generator=rng),
        "classes": torch.randint(-1, 10, (12,), generator=rng),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def losses(
    fine: Tensor,
    coarse: Tensor,
    location: Tensor,
    weights: Tensor,
    centers: Tensor,
    radii: Tensor,
    labels: Tensor,
    counts: Tensor,
    classes: Tensor,
) -> Tensor:
    """A detector's losses on queries that aggregate two levels, and on a heatmap head on the fine level."""
    rows, shape, start = saccade.feature_maps_format([fine, coarse])
    queries = saccade.deformable_aggregation(rows, shape, start, location, weights).flatten(0, 1)  # (12, 8)
    heatmap = torch.zeros_like(fine[:, 0])
    saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=counts)
    return (
        saccade.sigmoid_focal_loss(queries, classes, avg_factor=4.0)
        + saccade.softmax_focal_loss(queries, classes)
        + saccade.gaussian_focal_loss_with_logits(fine.mean(1), heatmap, avg_factor="num_pos")
        + saccade.gaussian_focal_loss(fine.mean(1).sigmoid(), heatmap, avg_factor="num_pos")
    )


def step(call, inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = [inputs[name].requires_grad_() for name in ("fine", "coarse", "location", "weights")]
    loss = call(**inputs)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_steps_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left.cpu(), right.cpu(), rtol=1e-4, atol=1e-6)


def test_compiled_by_inductor(device):
    """The default backend generates code around the operators; it needs a C++ compiler on the CPU."""
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True)
    for seed in range(2):
        assert_steps_agree(step(compiled, make_inputs(device, seed)), step(losses, make_inputs(device, seed)))


def test_bitwise_repeatable_with_deterministic_algorithms(device):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(losses, make_inputs(device)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@needs_gpu
def test_gpu_agrees_with_cpu():
    assert_steps_agree(step(losses, make_inputs("cuda")), step(losses, make_inputs("cpu")))


@needs_gpu
def test_captured_in_a_cuda_graph():
    static = make_inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(losses, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(losses, static)
    for seed in (1, 2):
        with torch.no_grad():
            for name, value in make_inputs("cuda", seed).items():
                static[name].copy_(value)
        graph.replay()
        assert_steps_agree(results, step(losses, make_inputs("cuda", seed)))


@needs_gpu
def test_on_another_stream():
    expected = step(losses, make_inputs("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = step(losses, make_inputs("cuda"))
    stream.synchronize()
    assert_steps_agree(actual, expected)


@needs_two_gpus
def test_on_the_second_gpu():
    actual = step(losses, make_inputs("cuda:1"))
    assert all(value.device == torch.device("cuda:1") for value in actual)
    assert_steps_agree(actual, step(losses, make_inputs("cuda:0")))
