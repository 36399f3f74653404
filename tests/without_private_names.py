"""Saccade where PyTorch or Triton lacks a private name: each of them deleted in a process of its own.

Run as a script, it prints what happened with each name in JSON. Processes are forked from one that has imported torch
and nothing else, so that Saccade is imported where the name is gone already.
"""

import contextlib
import io
import json
import multiprocessing
import pkgutil
import sys
import tempfile
import traceback
import types
from pathlib import Path

import torch
import torch._library.autograd
import torch.autograd.forward_ad

UNTOUCHED = ""
"""In place of a name: nothing is deleted."""
AT_ONCE = 2
NEEDED_BY_PYTORCH = ("_cuda_", "redispatch", "WeakTensorKeyDictionary")
"""In its own code, some of which is imported late."""


class Gone:
    """In place of an attribute that cannot be deleted."""

    def __get__(self, *_):
        """What an attribute does that is not there."""
        raise AttributeError


def delete(name: str) -> None:
    """Delete what `pkgutil.resolve_name` finds under a name; hide it from that where PyTorch and Triton need it."""
    module, _, attributes = name.partition(":")
    if module.startswith("triton") or any(part in name for part in NEEDED_BY_PYTORCH):
        resolve = pkgutil.resolve_name

        def resolve_others(wanted: str) -> object:
            if wanted == name:
                raise AttributeError(name)
            return resolve(wanted)

        pkgutil.resolve_name = resolve_others
        return
    *owners, last = attributes.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
    if owner is torch._C:  # PyTorch's own code still finds it: where the name is gone, it needs it no more
        torch._library.autograd._C = types.SimpleNamespace(**vars(torch._C))
    if last in vars(owner):
        delattr(owner, last)
    elif isinstance(owner, type):  # inherited from one that is written in C, and cannot be changed
        setattr(owner, last, Gone())
    else:
        delattr(type(owner), last)
    try:
        pkgutil.resolve_name(name)
    except AttributeError:
        return
    raise AssertionError(f"{name} is still there")


def results(device: str) -> dict[str, list[torch.Tensor]]:
    """Values and gradients of every operator, and what else must not depend on private names."""
    import saccade
    from saccade import doctor

    found = {
        operator: [r.detach().cpu() for r in run(device, torch.float32)] for operator, run in doctor.CHECKS.items()
    }
    heatmap = torch.zeros(1, 4, 4, device=device)
    scaled = (heatmap * torch.ones((), device=device, requires_grad=True)).sum()  # autograd saves the heatmap
    saccade.draw_heatmap(heatmap, *(torch.tensor(v, device=device) for v in ([[1, 1]], [0], [0])))
    with contextlib.suppress(RuntimeError):
        scaled.backward()
        raise AssertionError("a write in place that autograd does not see")
    logits = torch.zeros(2, 3, device=device, requires_grad=True)
    loss = saccade.softmax_focal_loss(logits, torch.tensor([0, 1], device=device))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with contextlib.suppress(RuntimeError):
        gradient.sum().backward()
        raise AssertionError("differentiated twice")
    rows, *indices = saccade.feature_maps_format([torch.arange(120.0, device=device).view(1, 2, 3, 4, 5)])
    groups = saccade.feature_maps_format([rows, *indices], inverse=True)
    found["formatted back"] = [feature.cpu() for group in groups for feature in group]
    assert found["formatted back"][0].shape == (1, 2, 3, 4, 5)
    data, index = torch.zeros(1, 2, device=device), torch.tensor([[9]], device=device)
    indices = saccade.RaggedBatch(index, sample_sizes=torch.tensor([1], device=device))
    with contextlib.suppress(IndexError):
        saccade.ragged.batched_indexing_access(data, indices)
        assert device != "cpu", "an index out of range that nobody notices"
    return found


def outcome(name: str, device: str, expected: Path) -> dict[str, str]:
    """What goes wrong without a name, and what `saccade doctor` prints."""
    if name:
        delete(name)
    actual = results(device)
    if not name:
        torch.save(actual, expected)
    for operator, right in torch.load(expected).items():
        for left, wanted in zip(actual[operator], right, strict=True):
            assert left.shape == wanted.shape, operator
            assert torch.allclose(left, wanted, rtol=1e-5, atol=1e-6), f"{operator}: {left} in place of {wanted}"
    from saccade import doctor

    doctor.check = lambda operator, device: None  # done above
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = doctor.main([])
    assert status == 0, printed.getvalue()
    return {"doctor": printed.getvalue()}


def report(name: str, device: str, expected: Path, connection) -> None:
    """`outcome`, or how it failed, sent through a pipe."""
    try:
        connection.send(outcome(name, device, expected))
    except BaseException:
        connection.send({"fault": traceback.format_exc()})


def main(device: str, names: list[str]) -> None:
    """Print the outcome for each name, and for none."""
    fork = multiprocessing.get_context("fork")
    outcomes = {}
    with tempfile.TemporaryDirectory() as directory:
        expected = Path(directory, "expected.pt")
        for together in [[UNTOUCHED], *(names[first : first + AT_ONCE] for first in range(0, len(names), AT_ONCE))]:
            running = []
            for name in together:
                ours, theirs = fork.Pipe()
                process = fork.Process(target=report, args=(name, device, expected, theirs))
                process.start()
                theirs.close()
                running.append((name, process, ours))
            for name, process, connection in running:
                try:
                    outcomes[name] = connection.recv()
                except EOFError:
                    outcomes[name] = {"fault": "the process ended without a word"}
                process.join()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
