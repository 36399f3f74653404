"""Axes that several tensors are walked through with."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.losses.memory_axes import memory_axes


def places(sizes, strides) -> list[tuple[int, ...]]:
    """Offsets into all tensors, of every element in turn; axes innermost first."""
    found = []
    for index in itertools.product(*(range(size) for size in reversed(sizes))):
        found.append(tuple(sum(i * s for i, s in zip(reversed(index), steps, strict=True)) for steps in strides))
    return found


@st.composite
def tensors_of_one_shape(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    strides = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(shape))))
        given_shape = [draw(st.sampled_from([1, size])) for size in shape]  # those of size 1 are expanded
        gap = draw(st.integers(0, 1))
        tensor = torch.empty([given_shape[axis] + gap for axis in order])
        tensor = tensor.permute([order.index(axis) for axis in range(len(shape))])
        tensor = tensor[tuple(slice(size) for size in given_shape)].expand(shape)
        strides.append(tensor.stride())
    return shape, strides


@settings(max_examples=300)
@given(tensors_of_one_shape())
def test_every_element_is_visited_once_and_all_tensors_agree_where(drawn):
    shape, strides = drawn
    sizes, steps = memory_axes(shape, *strides)
    backwards = [tuple(reversed(of_tensor)) for of_tensor in strides]
    assert sorted(places(sizes, steps)) == sorted(places(shape[::-1], backwards))
    in_first = [place[0] for place in places(sizes, steps[:1])]
    assert in_first == sorted(in_first)


def test_axes_that_can_be_one_are_one():
    assert memory_axes((2, 3, 4), (12, 4, 1)) == ((24,), [(1,)])
    assert memory_axes((2, 3, 4), (12, 1, 3)) == ((24,), [(1,)])  # permuted, and still one run of memory
    assert memory_axes((2, 3, 4), (12, 4, 1), (0, 4, 1)) == ((12, 2), [(1, 12), (1, 0)])
    assert memory_axes((2, 1, 4), (4, 77, 1)) == ((8,), [(1,)])
    assert memory_axes((), ()) == ((1,), [(0,)])
    assert memory_axes((1, 1), (5, 7), (1, 1)) == ((1,), [(0,), (0,)])
