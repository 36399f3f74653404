"""Training as people run it: resumed, interrupted, repeated to the bit, compiled, in several processes, logged."""

import copy
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from saccade import RaggedBatch
from saccade.cli import app
from saccade_demo import DemoError, SampleError, run
from saccade_demo.data.ahead import OnItsWay
from saccade_demo.data.batch import Batch, make_batch
from saccade_demo.data.nuscenes import LoadedFrames
from saccade_demo.data.source import RenderedScenes
from saccade_demo.geometry import Sample
from saccade_demo.model import Detector, Output
from saccade_demo.rendering.scene import scene
from saccade_demo.run import DemoOptions, _checked_recipe, _what_it_is, density_and_range
from saccade_demo.training import journal, stream
from saccade_demo.training.checkpoint import FORMAT
from saccade_demo.training.distribution import ALONE, Ranks
from saccade_demo.training.loss import DetectionLoss
from saccade_demo.training.recipe import Recipe
from saccade_demo.training.stream import VIEWS_APART, SeenImages, Stream, batches_of_steps, num_samples
from saccade_demo.training.trainer import Trainer, decode
from small_demo import IMAGE_WH, SmallScenes, after_step, make_small, small_config

SCRIPT = Path(__file__).with_name("small_demo.py")
GPUS = torch.cuda.device_count()
PAIRS = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(GPUS < 2, reason="there are no two GPUs"))]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch.setattr)


def demo(*options: Any) -> Any:
    """Run the command in this process, on the CPU."""
    return CliRunner().invoke(app, ["demo", "--device", "cpu", *map(str, options)])


def script(*options: Any, ranks: int = 0, **environment: Any) -> subprocess.Popen:
    """Start the command in a process of its own, or several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *torchrun, str(SCRIPT), "demo", *map(str, options)]
    # As many threads as here, since sums depend on it.
    paths = os.pathsep.join(sys.path)
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(device: str, *options: Any) -> None:
    """Run the command: in this process on the CPU, but on a GPU, where cuBLAS reads its setting once, in its own."""
    if device == "cpu":
        result = demo(*options)
        assert result.exit_code == 0, result.output
    else:
        process = script("--device", device, *options)
        assert process.wait() == 0, process.communicate()


def saved(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)["state"]


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two saved states have the same losses, weights and moments, step by step."""
    assert one["history"]["losses"] == other["history"]["losses"]
    assert one["trainer"]["step"] == other["trainer"]["step"]
    for name, tensor in one["trainer"]["model"].items():
        assert torch.equal(tensor, other["trainer"]["model"][name]), name
    for index, moments in one["trainer"]["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, other["trainer"]["optimizer"]["state"][index][name]), (index, name)


# ---- the same bits


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(GPUS < 1, reason="there is no GPU"))],
)
@pytest.mark.parametrize("steps", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_deterministic_runs_have_the_same_bits(tmp_path, device, steps):
    """In two processes."""
    files = [tmp_path / name for name in ("one.pt", "other.pt")]
    options = ["--deterministic", "--steps", steps, "--batch", 2, "--out", tmp_path]
    process = script("--device", device, *options, "--checkpoint", files[0])
    finish(device, *options, "--checkpoint", files[1])
    assert process.wait() == 0, process.communicate()
    assert_same_bits(*map(saved, files))


def test_deterministic_is_over_with_the_run(tmp_path, monkeypatch):
    seen = []
    after_step(1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()), monkeypatch.setattr)
    assert demo("--steps", 1, "--deterministic", "--out", tmp_path).exit_code == 0
    assert demo("--steps", 1, "--out", tmp_path).exit_code == 0
    assert seen == [True, False]


# ---- losses that are read late


@pytest.mark.parametrize("options", [["--curve-every", 0], ["--curve-every", 4], ["--checkpoint-every", 4]])
def test_a_loss_that_is_not_finite_is_told_with_its_step(options, tmp_path, monkeypatch):
    """Also where the next step has been made before the losses are read."""
    forward = DetectionLoss.forward
    calls = []

    def spoilt(self, *args):
        losses = forward(self, *args)
        calls.append(1)
        return {name: loss * (math.nan if len(calls) == 3 else 1) for name, loss in losses.items()}

    monkeypatch.setattr(DetectionLoss, "forward", spoilt)
    result = demo("--steps", 20, *options, "--out", tmp_path, "--checkpoint", tmp_path / "c.pt")
    assert (result.exit_code, result.stderr) == (2, "saccade demo: the loss is nan at step 3 (with --amp off)\n")
    assert not (tmp_path / "c.pt").exists()


def test_losses_of_a_step_are_those_of_that_step_however_late_they_are_read():
    trainer = Trainer(SmallScenes(0, 0), small_detector(), torch.device("cpu"), Recipe(30))
    told = list(islice(trainer.train(), 3))
    again = Trainer(SmallScenes(0, 0), small_detector(), torch.device("cpu"), Recipe(30))
    assert [step.step for step in told] == [1, 2, 3]
    assert [step.losses() for step in told] == [step.losses() for step in islice(again.train(), 3)]
    rates = [step.learning_rate for step in told]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3])  # of thirty steps two warm up, and the next begins to fall


def test_a_loader_that_is_killed_is_told(monkeypatch):
    trainer = Trainer(SmallScenes(0, 0), small_detector(), torch.device("cpu"), Recipe(3))
    monkeypatch.setattr(SmallScenes, "training", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SampleError, match="a process that makes samples was ended"):
        list(trainer.train())


# ---- what is learnt from


def test_what_is_held_out_is_never_learnt_from():
    source = RenderedScenes(1, 2)
    for index in range(2):
        assert np.array_equal(source.held_out[index].images, scene(1, "held-out", index).images)
        assert np.array_equal(source.training(index).images, scene(1, "train", index).images)
        assert not np.array_equal(source.training(index).images, source.held_out[index].images)
    sent = pickle.loads(pickle.dumps(source))  # to the processes that make scenes
    assert np.array_equal(sent.training(0).images, source.training(0).images)
    assert sent.held_out == []


def test_coordinates_are_turned_anew_at_every_step(monkeypatch):
    """Or the places of a single frame could be learnt by heart."""
    sample = scene(0, "train", 0, IMAGE_WH)
    monkeypatch.setattr(SmallScenes, "training", lambda *_: sample)
    made = []
    trainer = Trainer(SmallScenes(0, 0), small_detector(), torch.device("cpu"), Recipe(3))
    monkeypatch.setattr(trainer, "_backward", lambda batches: made.extend(batches) or {"total": torch.zeros(())})
    list(trainer.train())
    angles = []
    for batch in made:
        x, y = batch.boxes.tensor[0, :, :2].T
        before = sample.boxes[sample.labels >= 0]
        turn = torch.atan2(y, x) - torch.from_numpy(np.arctan2(before[:, 1], before[:, 0]))
        assert torch.allclose(turn.sin(), turn.sin()[:1].expand_as(turn), atol=1e-4)
        angles.append(float(turn[0]) % (2 * math.pi))
        place = batch.boxes.tensor[0, :, :3] @ batch.projection[0, 0, :3, :3].T + batch.projection[0, 0, :3, 3]
        expected = before[:, :3] @ sample.projection[0, :3, :3].T + sample.projection[0, :3, 3]
        torch.testing.assert_close(place, torch.from_numpy(expected), rtol=1e-4, atol=1e-2)
    assert min(abs(a - b) for a, b in itertools.combinations(angles, 2)) > 0.01


def small_detector() -> Detector:
    torch.manual_seed(0)
    return Detector(small_config(num_classes=4))


@pytest.mark.skipif(GPUS < 1, reason="there is no GPU")
def test_a_step_on_a_gpu_waits_for_the_device_once(monkeypatch):
    """For the costs of the assignment, on the way of which it has more to do."""
    trainer = Trainer(SmallScenes(0, 0), small_detector(), torch.device("cuda"), Recipe(8, batch=2, micro_batch=2))
    waited = []
    arrived = OnItsWay.arrived
    monkeypatch.setattr(OnItsWay, "arrived", lambda self: waited.append(1) or arrived(self))
    steps = trainer.train()
    for _ in range(4):
        next(steps)
    waited.clear()
    torch.cuda.set_sync_debug_mode("error")  # raises where anything else waits
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 1
    steps.close()


# ---- what is found


def test_second_answers_are_left_out():
    """Of boxes 4 m long, those of a class within 1.6 m of a better one that is not itself left out."""
    places = [(0, 1), (1, 0), (2.5, 0), (-1.5, 1), (-1.7, 1), (0.2, 1)]  # along x, and the class
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    anchors = np.array([[x, 10, -1, math.log(4), math.log(2), 0, 0, 1, 0, 0, 0] for x, _ in places], dtype=np.float32)
    logits = torch.full((1, len(places), 2), -9.0)
    for row, ((_, label), score) in enumerate(zip(places, scores, strict=True)):
        logits[0, row, label] = math.log(score / (1 - score))
    order = [3, 0, 5, 1, 4, 2]  # the detector's own order does not matter
    output = Output([logits[:, order]], [torch.from_numpy(anchors[order])[None]], logits, logits)
    (found,) = decode(output)
    # The one at -1.5 is left out for that at 0, and so does not keep out the one at -1.7, which is 1.7 m from 0.
    np.testing.assert_allclose(found.boxes[:, 0], [0, 1, -1.7], rtol=1e-6)
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.5], rtol=1e-5)
    assert found.labels.tolist() == [1, 0, 1]


def test_samples_looked_at_together_are_found_as_one_by_one(monkeypatch):
    trainer = Trainer(SmallScenes(0, 0), small_detector(), torch.device("cpu"), Recipe(4))
    list(trainer.train())
    samples = trainer.source.held_out
    alone = list(trainer.detections(samples))
    batches = []
    monkeypatch.setattr("saccade_demo.training.trainer.EVALUATED_AT_ONCE", {"cpu": 2})
    look = trainer.output
    monkeypatch.setattr(trainer, "output", lambda batch: batches.append(len(batch.images)) or look(batch))
    together = list(trainer.detections(iter(samples)))
    assert batches == [2, 1]
    for (one, found), (other, also) in zip(alone, together, strict=True):
        assert one is other
        assert len(found.scores) > 0
        # Convolutions of two samples add up in another order.
        np.testing.assert_allclose(np.sort(also.scores), np.sort(found.scores), rtol=1e-4)


# ---- density and range


def test_density_and_range_are_those_of_the_boxes_to_be_found(tmp_path, monkeypatch):
    def held_out(places: list[tuple[float, float]], labels: list[int]) -> Sample:
        boxes = np.array([[x, y, -1, 4, 2, 1.5, 0] for x, y in places], dtype=np.float32).reshape(-1, 7)
        return replace(scene(0, "held-out", 0, IMAGE_WH), boxes=boxes, labels=np.array(labels, dtype=np.int64))

    scenes = [
        held_out([(3, 4), (0, 54), (0, 56), (1, 1)], [0, 1, 2, -1]),  # too far away, and ignored
        held_out([], []),
        held_out([(0, 20)], [3]),
    ]
    monkeypatch.setattr(
        SmallScenes,
        "__init__",
        lambda self, seed, number: vars(self).update(seed=seed, name="scene", evaluated_on="3 scenes", held_out=scenes),
    )
    report = tmp_path / "r.json"
    result = demo("--steps", 1, "--out", tmp_path, "--json", report)
    assert result.exit_code == 0, result.output
    told = json.loads(report.read_text())
    assert told["objects_per_scene"] == {"min": 0, "mean": 1, "max": 2}
    assert told["range_m"] == {"min": 5, "max": 54}
    assert "0 to 2, 1.0 on average; 5.0 to 54.0 m away" in result.output


def test_without_boxes_there_is_no_range():
    assert density_and_range([[np.zeros(0)], [np.zeros(0)]]) == {
        "objects_per_scene": {"min": 0, "mean": 0, "max": 0},
        "range_m": None,
    }


# ---- stopped and resumed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Seven steps, saved at the end."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        result = demo("--steps", 7, "--checkpoint", directory / "c.pt", "--out", directory)
    assert result.exit_code == 0, result.output
    return directory / "c.pt"


def test_killed_and_resumed_is_as_if_undisturbed(tmp_path, undisturbed):
    file, report = tmp_path / "c.pt", tmp_path / "r.json"
    options = ["--steps", 7, "--checkpoint", file, "--checkpoint-every", 2, "--out", tmp_path]
    process = script(*options, "--device", "cpu", KILLED_AFTER="5")
    assert process.wait() == -signal.SIGKILL, process.communicate()
    process.communicate(timeout=30)  # the processes that make samples have its output open: they end, too
    assert saved(file)["trainer"]["step"] == 4
    result = demo(*options, "--json", report)
    assert result.exit_code == 0, result.output
    assert "Resumed after 4 of 7 steps" in result.output
    assert_same_bits(saved(undisturbed), saved(file))
    told = json.loads(report.read_text())
    assert (told["steps"], told["resumed_at"], told["interrupted"]) == (7, 4, False)
    assert len(told["losses"]["total"]["curve"]) == 7


def test_a_finished_run_is_only_evaluated_again(tmp_path, undisturbed):
    before = undisturbed.stat().st_mtime_ns
    report = tmp_path / "r.json"
    assert demo("--steps", 7, "--checkpoint", undisturbed, "--out", tmp_path, "--json", report).exit_code == 0
    told = json.loads(report.read_text())
    assert (told["steps"], told["resumed_at"]) == (7, 7)
    assert told["scenes_per_second"] > 0
    assert 0 < told["waiting_share"] < 1
    assert undisturbed.stat().st_mtime_ns == before


def test_ctrl_c_saves_and_reports_and_can_be_resumed(tmp_path, monkeypatch, undisturbed):
    file, report = tmp_path / "c.pt", tmp_path / "r.json"
    options = ["--steps", 7, "--checkpoint", file, "--out", tmp_path, "--json", report]
    with monkeypatch.context() as patch:
        after_step(2, lambda: signal.raise_signal(signal.SIGINT), patch.setattr)
        result = demo(*options)
    assert result.exit_code == 130, result.output
    assert "Interrupted" in result.output
    assert "recall at 2 m" in result.output
    told = json.loads(report.read_text())
    # The step after which it came had been made; the one that was then begun is the last.
    assert (told["steps"], told["interrupted"]) == (3, True)
    assert saved(file)["trainer"]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert demo(*options).exit_code == 0
    assert_same_bits(saved(undisturbed), saved(file))


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after_step(2, twice, monkeypatch.setattr)
    report = tmp_path / "r.json"
    result = demo("--steps", 5, "--checkpoint", tmp_path / "c.pt", "--out", tmp_path, "--json", report)
    assert result.exit_code == 130
    assert not report.exists()
    assert not (tmp_path / "c.pt").exists()


# ---- checkpoints that are refused


def refused(file: Path, message: str, *options: Any) -> None:
    result = demo("--steps", 7, "--checkpoint", file, "--out", SCRIPT.parent, *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("saccade demo: --checkpoint")
    assert message in line


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path, undisturbed, share):
    content = undisturbed.read_bytes()
    file = tmp_path / "c.pt"
    file.write_bytes(content[: int(share * len(content))])
    refused(file, "is cut short or damaged")


def test_a_damaged_checkpoint_is_refused(tmp_path, undisturbed):
    content = bytearray(undisturbed.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    file = tmp_path / "c.pt"
    file.write_bytes(content)
    refused(file, "is cut short or damaged")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    file = tmp_path / "c.pt"
    for content in (b"", b"something else\n", b"\x80\x02", bytes(1000)):
        file.write_bytes(content)
        refused(file, "is no checkpoint")
        assert file.read_bytes() == content
    for content in (torch.ones(3), {"model": {}}, {"format": FORMAT + "0", "run": {}, "state": {}}):
        torch.save(content, file)
        refused(file, "is no checkpoint")
    for content in ({}, {"state": {}}, {"run": {}}, {"run": [], "state": {}}, {"run": {}, "state": None}):
        torch.save({"format": FORMAT, **content}, file)
        refused(file, "is no checkpoint")
    refused(tmp_path, "cannot read")
    refused(tmp_path / "nowhere" / "c.pt", "no directory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 8], "was made with --steps 7, not with --steps 8"),
        (["--seed", 1], "was made with --seed 0, not with --seed 1"),
        (["--batch", 2], "was made with --batch 1, not with --batch 2"),
        (["--learning-rate", 0.001], "was made with --learning-rate 0.002, not with --learning-rate 0.001"),
        (["--amp", "bf16"], "was made with --amp off, not with --amp bf16"),
        (["--frame", "/f"], "was made without --frame, not with --frame /f"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(undisturbed, options, message):
    refused(undisturbed, message, *options)


def test_other_views_are_another_run(tmp_path):
    file = tmp_path / "c.pt"
    assert demo("--steps", 7, "--batch", 2, "--checkpoint", file, "--out", tmp_path).exit_code == 0
    refused(file, "was made with --views 1, not with --views 2", "--batch", 2, "--views", 2)


def test_what_names_the_same_data_is_the_same_run():
    recipe = Recipe(1)

    def what_it_is(**data: Any) -> dict[str, Any]:
        return _what_it_is(DemoOptions(1, 0, None, "cpu", "off", Path(), **data), recipe)

    root = Path("nuscenes")
    expected = what_it_is(nuscenes=root, version="v1.0-mini", scenes=("a", "b"))
    assert what_it_is(nuscenes=root, scenes=("b", "a", "b")) == expected
    assert what_it_is(nuscenes=root, scenes=("a",)) != expected
    assert what_it_is(nuscenes=root, version="v1.0-trainval", scenes=("a", "b")) != expected
    assert what_it_is()["--version"] is None


def test_a_checkpoint_of_another_detector_is_refused(undisturbed, monkeypatch):
    monkeypatch.setattr("saccade_demo.run.DetectorConfig", partial(small_config, num_layers=1))
    refused(undisturbed, "is of another detector")


def test_an_old_checkpoint_survives_a_failed_write(tmp_path, undisturbed, monkeypatch):
    file = tmp_path / "c.pt"
    file.write_bytes(undisturbed.read_bytes())
    torch.save({**torch.load(file, weights_only=True), "state": at_step(saved(file), 3)}, file)
    before = file.read_bytes()

    def no_room(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    refused(file, "No space left on device")
    assert file.read_bytes() == before
    assert not file.with_name("c.pt.partial").exists()


def at_step(state: dict[str, Any], step: int) -> dict[str, Any]:
    return {**state, "trainer": {**state["trainer"], "step": step}}


# ---- several processes


def curves(file: Path) -> dict[str, torch.Tensor]:
    losses = saved(file)["history"]["losses"]
    assert set(losses) == {"class", "box", "heatmap", "lift", "total"}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}


def demo_in_two_ranks(*options: Any) -> str:
    """Run the command in two processes, of which the first is this one: that spares one, and torchrun.

    Returns:
        What both print.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setenv("MASTER_PORT", str(store.port))
        be_rank(patch, 0)
        other = script("--device", "cpu", *options, RANK="1", LOCAL_RANK="1")
        result = demo(*options)
    output, errors = other.communicate()
    assert (result.exit_code, other.returncode) == (0, 0), (result.output, errors)
    return result.output + output


@pytest.mark.parametrize("steps", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", PAIRS)
def test_two_ranks_train_like_one_process(tmp_path, device, steps):
    """Two ranks against one process with the same global batch: steps of two scenes, each pass of one scene."""
    options = ["--deterministic", "--steps", steps, "--batch", 2, "--micro-batch", 1, "--out", tmp_path]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    report = tmp_path / "r.json"
    if device == "cpu" and steps < 20:
        output = demo_in_two_ranks(*options, "--checkpoint", two, "--json", report)
    else:
        together = script("--device", device, *options, "--checkpoint", two, "--json", report, ranks=2)
        output, errors = together.communicate()
        assert together.returncode == 0, errors
    finish(device, *options, "--checkpoint", one)
    assert output.count("What the detector learnt") == 1  # the first rank alone prints
    expected = curves(one)
    for name, curve in curves(two).items():
        assert len(curve) == steps
        # What a pass computes has the same bits wherever it runs, and two gradients have one sum. Without that, the
        # choice of anchors and their assignment would make much of every rounding within few steps.
        torch.testing.assert_close(curve, expected[name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    told = json.loads(report.read_text())
    assert (told["ranks"], told["batch"], told["micro_batch"]) == (2, 2, 1)
    # Of all three held-out scenes; none of the boxes is too far away to be counted.
    assert told["boxes"] == sum(int((sample.labels >= 0).sum()) for sample in SmallScenes(0, 0).held_out)
    assert told["scenes_per_second"] > 0


def test_gradients_of_ranks_with_several_passes_are_those_of_one_process(tmp_path):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    options = ["--steps", 1, "--batch", 4, "--micro-batch", 1, "--out", tmp_path]
    demo_in_two_ranks(*options, "--checkpoint", two)
    assert demo(*options, "--checkpoint", one).exit_code == 0
    # After one step the first moment is a tenth of the gradient.
    moments = [
        torch.cat([moment["exp_avg"].flatten() for moment in saved(file)["trainer"]["optimizer"]["state"].values()])
        for file in (one, two)
    ]
    # Sums of float32 in another order.
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-4, atol=1e-6 * float(moments[0].abs().max()))


@pytest.mark.parametrize("device", PAIRS)
def test_a_rank_that_fails_ends_all(tmp_path, device):
    process = script("--device", device, "--steps", 1000, "--out", tmp_path, ranks=2, FAILING_RANK="1")
    _, errors = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "this rank was told to fail" in errors


def be_rank(monkeypatch, rank: Any) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(("rank", "status"), [(0, 130), (1, 0)])
def test_the_first_rank_alone_tells_of_an_interruption(tmp_path, monkeypatch, rank, status):
    """torchrun ends all ranks when one of them fails, and the first one is the last to be done."""
    be_rank(monkeypatch, rank)
    monkeypatch.setattr(run, "run_demo", lambda _: {"interrupted": True})
    assert demo("--out", tmp_path).exit_code == status


@pytest.mark.parametrize(("error", "told"), [(DemoError("fault"), ""), (SampleError("fault"), "saccade demo: fault\n")])
def test_another_rank_tells_what_is_wrong_with_its_samples(tmp_path, monkeypatch, error, told):
    def raise_it(_: Any) -> None:
        raise error

    be_rank(monkeypatch, 1)
    monkeypatch.setattr(run, "run_demo", raise_it)
    result = demo("--out", tmp_path)
    assert (result.exit_code, result.stderr) == (2, told)


def test_a_fault_in_a_held_out_sample_is_a_sample_error():
    source = SmallScenes(0, 0)
    scenes = source.held_out

    def load(index: int) -> Sample:
        if index == 1:
            raise DemoError("not a readable image")
        return scenes[index]

    held_out: Any = LoadedFrames(load, len(scenes))
    source.held_out = held_out
    trainer = Trainer(source, Detector(small_config(num_classes=4)), torch.device("cpu"), Recipe(1))
    with pytest.raises(SampleError, match="not a readable image"):
        trainer.evaluate()


def test_a_rank_that_is_no_number_is_one_line(tmp_path, monkeypatch):
    be_rank(monkeypatch, "a")
    result = demo("--out", tmp_path)
    message = "RANK in the environment: expected a number, as torchrun sets it, got 'a'"
    assert (result.exit_code, result.stderr) == (2, f"saccade demo: {message}\n")


def test_what_is_refused_under_torchrun(tmp_path, monkeypatch):
    be_rank(monkeypatch, 0)
    assert Ranks.from_environment() == Ranks(0, 2, 0, 2)
    result = demo("--batch", 3, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (
        2,
        "saccade demo: --batch: expected a multiple of 2, the number of processes, got 3\n",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, message in [("cuda:0", "expected cpu or cuda"), ("cuda", "2 processes want a GPU each, there are 1")]:
        result = CliRunner().invoke(app, ["demo", "--device", device, "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_step_of_several_scenes_adds_up(tmp_path):
    """Two passes of one scene have the gradient of their common loss, apart from batch normalization."""
    source = SmallScenes(0, 0)
    torch.manual_seed(0)
    trainer = Trainer(source, Detector(small_config(num_classes=4)), torch.device("cpu"), Recipe(1, batch=2))
    samples = [source.training(0), source.training(1)]
    trainer.model.eval()
    losses = trainer._backward([make_batch([sample], trainer.model.STRIDE) for sample in samples])
    gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    batch = make_batch(samples, trainer.model.STRIDE)
    expected = trainer.loss(trainer.model(batch.images, batch.projection), batch, batch.objects(16))
    sum(expected.values()).backward()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-5, atol=0)  # sums in another order
    together = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    # Float32 sums in another order; a gradient is small beside the terms that it is the sum of.
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for gradient, other in zip(gradients, together, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5 * scale)


# ---- seen again


RECIPE = Recipe(7, batch=8, micro_batch=4, views=4)


def all_new(step: int, recipe: Recipe = RECIPE, ranks: Ranks = ALONE) -> list[Batch]:
    """The batches of a step where nothing is known of the steps before it, as after an interruption."""
    batches = Stream(SmallScenes(0, 0), recipe, ranks, Detector.STRIDE)[step]
    assert isinstance(batches, list)
    return batches


@pytest.fixture
def two_steps_apart(monkeypatch):
    monkeypatch.setattr(stream, "VIEWS_APART", 2)


def assert_same_batches(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    for batch, expected in zip(one, other, strict=True):
        for name, value in vars(expected).items():
            if isinstance(value, RaggedBatch):
                assert torch.equal(vars(batch)[name].tensor, value.tensor), name
                assert torch.equal(vars(batch)[name].sample_sizes, value.sample_sizes), name
            elif isinstance(value, torch.Tensor):
                assert torch.equal(vars(batch)[name], value), name
            else:
                assert vars(batch)[name] == value, name


@pytest.mark.parametrize("cores", [1, 4])
def test_what_is_seen_again_is_what_would_be_made_again(monkeypatch, two_steps_apart, cores):
    """With one loader, and with two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    source, device = SmallScenes(0, 0), torch.device("cpu")
    expected = list(map(all_new, range(7)))  # before there are loaders, which then need not render the scenes again
    made = list(batches_of_steps(source, RECIPE, ALONE, Detector.STRIDE, device, done=0))
    assert len(made) == 7
    for batches, all_made in zip(made, expected, strict=True):
        assert_same_batches(batches, all_made)


def test_a_scene_is_seen_in_steps_apart_and_every_second_time_in_a_mirror(two_steps_apart):
    for passes in zip(all_new(0), all_new(2), all_new(4), all_new(6), strict=True):
        places, angles = [], []
        for view, batch in enumerate(passes):
            # Of four samples in a pass, one is new and one seen for the last time.
            images = batch.images[view].flip(-1) if view % 2 else batch.images[view]
            assert torch.equal(images, passes[0].images[0])
            assert not any(torch.equal(batch.images[view], batch.images[other]) for other in range(view))
            boxes, projection = batch.boxes.split()[view], batch.projection[view, 0]
            u, _, depth = (boxes[:, :3] @ projection[:3, :3].T + projection[:3, 3]).T
            places.append((IMAGE_WH[0] * depth - u if view % 2 else u) / depth)
            angles.append(float(torch.atan2(boxes[0, 1], boxes[0, 0])))
        for place in places[1:]:
            torch.testing.assert_close(place, places[0], rtol=1e-3, atol=1e-2)
        assert min(abs(a - b) for a, b in itertools.combinations(angles, 2)) > 0.01


def test_no_scene_is_made_twice(monkeypatch, two_steps_apart):
    made = []
    source = SmallScenes(0, 0)
    monkeypatch.setattr(source, "training", lambda number: made.append(number) or scene(0, "train", 0, IMAGE_WH))
    batches = Stream(source, RECIPE, ALONE, Detector.STRIDE)
    for step in range(RECIPE.steps):
        sent = sum(len(batch.images) for batch in batches[step])
        assert sent == (8 if step < 2 else 2)
        assert len(made) == len(set(made)) == num_samples(RECIPE, step + 1)
    # Nothing is kept of those that were seen for the last time.
    assert len(batches.seen) == 3 * 2 * 2
    assert all(sample.images.size == 0 and sample.images.base is None for sample in batches.seen.values())


def test_images_are_kept_until_they_are_seen_again(two_steps_apart):
    seen = SeenImages()
    images = []
    for step in range(5):
        images.append([weakref.ref(batch.images) for batch in seen.completed(all_new(step))])
    assert [{image() is not None for image in of_step} for of_step in images] == [{False}] * 3 + [{True}] * 2


@pytest.mark.parametrize("views", [1, 2, 4])
def test_every_sample_is_turned_otherwise_however_many_to_a_pass(monkeypatch, views):
    sample = scene(0, "train", 0, IMAGE_WH)
    monkeypatch.setattr(SmallScenes, "training", lambda *_: sample)
    turns = []
    for micro_batch in (4, 8):
        batches = all_new(1, Recipe(3, batch=8, micro_batch=micro_batch, views=views))
        turns.append({tuple(projection[0, 0, :2].tolist()) for batch in batches for projection in batch.projection})
    assert len(turns[0]) == 8
    assert turns[0] == turns[1]


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_share_the_passes_of_one_process(views):
    recipe = Recipe(3, batch=8, micro_batch=2, views=views)
    of_ranks = [batch for index in range(2) for batch in all_new(1, recipe, Ranks(index, 2))]
    assert len(of_ranks) == 4
    assert_same_batches(of_ranks, all_new(1, recipe))


@pytest.mark.parametrize(
    ("views", "steps", "left_out"),
    [(1, 19, 0), (1, 20, 10), (1, 400, 10), (4, 19, 0), (4, 20, 10), (4, 167, 10), (4, 168, 84), (4, 400, 84)],
)
def test_the_throughput_leaves_out_steps_unlike_the_later_ones(views, steps, left_out):
    recipe = Recipe(1000, batch=4, micro_batch=4, views=views)
    assert run._steady(list(map(float, range(steps))), recipe) == list(map(float, range(left_out, steps)))


def test_resumed_between_two_views_the_losses_are_the_same(two_steps_apart):
    def trainer() -> Trainer:
        return Trainer(SmallScenes(0, 0), small_detector(), torch.device("cpu"), RECIPE)

    undisturbed = [told.losses() for told in trainer().train()]
    first, second = trainer(), trainer()
    told = [step.losses() for step in islice(first.train(), 3)]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert told + [step.losses() for step in second.train()] == undisturbed


def test_views_are_told(tmp_path):
    report = tmp_path / "r.json"
    result = demo("--steps", 3, "--batch", 4, "--views", 2, "--out", tmp_path, "--json", report)
    assert result.exit_code == 0, result.output
    told = json.loads(report.read_text())
    assert (told["batch"], told["views"], told["samples"]["trained_on"]) == (4, 2, 12)  # none comes again yet
    assert told["trained_on"] == "12 rendered scenes"
    assert "views 2" in result.output


@pytest.mark.parametrize(("cores", "loaders"), [(1, 1), (2, 1), (5, 3), (7, 4), (16, 14), (32, 28), (64, 28)])
def test_the_process_that_made_a_scene_makes_the_steps_in_which_it_is_seen_again(monkeypatch, cores, loaders):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    number = stream._num_loaders(SmallScenes(0, 0), RECIPE, ALONE)
    assert number == loaders
    assert VIEWS_APART % number == 0
    assert stream._num_loaders(SmallScenes(0, 0), replace(RECIPE, views=1), ALONE) == max(1, min(cores - 2, 32))


def test_bad_batches_are_one_line(tmp_path):
    for options, message in [
        (["--batch", 0], "--batch: expected at least 1, got 0"),
        (["--batch", 4, "--micro-batch", 3], "--micro-batch: expected a divisor of 4, the scenes of a process, got 3"),
        (["--micro-batch", 0], "--micro-batch: expected a divisor of 1, the scenes of a process, got 0"),
        (["--batch", 6, "--views", 4], "--views: expected a divisor of 6, the scenes of a forward pass, got 4"),
        (["--views", 0], "--views: expected a divisor of 1, the scenes of a forward pass, got 0"),
        (["--learning-rate", 0], "--learning-rate: expected a positive number, got 0.0"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, got nan"),
    ]:
        result = demo("--out", tmp_path, *options)
        assert (result.exit_code, result.stderr) == (2, f"saccade demo: {message}\n")


@pytest.mark.parametrize(
    ("device", "ranks", "batch", "views"), [("cpu", 1, 1, 1), ("cpu", 2, 2, 1), ("cuda", 1, 16, 4), ("cuda", 4, 64, 4)]
)
def test_without_a_batch_a_gpu_gets_more_scenes(device, ranks, batch, views):
    def recipe(**options: Any) -> Recipe:
        asked = DemoOptions(1, 0, options.pop("frame", None), device, "off", Path(), **options)
        return _checked_recipe(asked, torch.device(device), Ranks(0, ranks))

    made = recipe()
    assert (made.batch, made.micro_batch, made.views) == (batch, batch // ranks, views)
    assert recipe(batch=6 * ranks).views == min(views, 2)
    assert recipe(frame=Path()).views == recipe(nuscenes=Path()).views == 1


# ---- compiled


def test_the_compiled_model_is_one_graph_and_computes_the_same(monkeypatch):
    """Traced with mixed precision and gradients, but not made into C++, which takes minutes."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        recipe = Recipe(3, amp="bf16", compiled=compiled)
        trainer = Trainer(SmallScenes(0, 0), Detector(small_config(num_classes=4)), torch.device("cpu"), recipe)
        losses.append([told.losses()["total"] for told in trainer.train()])
    assert len(graphs) == 1  # of the whole model, and no other for the second step
    # The same operators in the same order, but decomposed ones round in other places.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)


@pytest.mark.skipif(GPUS < 1, reason="there is no GPU")
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_recorded_graphs_give_the_gradients_of_the_model(micro_batch):
    """Also when gradients are added up, which must not lie where the next pass writes."""
    device = torch.device("cuda", 0)
    source = SmallScenes(0, 0)
    trainer = Trainer(source, small_detector(), device, Recipe(6, batch=2, micro_batch=micro_batch, compiled=True))
    for told in trainer.train():
        assert math.isfinite(told.losses()["total"])
    samples = [scene(0, "train", 100 + index, IMAGE_WH) for index in range(2)]
    parts = [samples[first : first + micro_batch] for first in range(0, 2, micro_batch)]
    batches = [make_batch(part, Detector.STRIDE).to(device) for part in parts]
    gradients = []
    for model in (trainer._trained, trainer.model):
        trainer._trained = model
        trainer.optimizer.zero_grad()
        trainer._backward(batches)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    compiled, eager = gradients
    # Convolutions are rounded to TF32, about 1e-3, and not everywhere alike.
    assert (compiled - eager).norm() < 0.05 * eager.norm()


# ---- logged


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_losses_speed_and_recall(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, report = tmp_path / "logs", tmp_path / "r.json"
    assert demo("--steps", 3, "--out", tmp_path, "--tensorboard", logs, "--json", report).exit_code == 0
    events = EventAccumulator(str(logs))
    events.Reload()
    losses = json.loads(report.read_text())["losses"]
    for name, loss in losses.items():
        scalars = events.Scalars(f"loss/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(loss["curve"], abs=1e-5)
    rates = [scalar.value for scalar in events.Scalars("training/learning_rate")]
    assert rates[0] == pytest.approx(2e-3)  # with three steps, one of them warms up
    assert rates[2] < rates[1] <= rates[0]
    assert all(scalar.value > 0 for scalar in events.Scalars("training/step_ms"))
    for what, step in [("untrained", 0), ("trained", 3), ("control", 3)]:
        (recall,) = events.Scalars(f"{what}/recall_at_2m")
        assert recall.step == step


def test_without_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "find_spec", lambda _: None)
    result = demo("--out", tmp_path, "--tensorboard", tmp_path / "logs")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "pip install 'saccade-ops[tensorboard]'" in line


def test_a_directory_for_tensorboard_that_cannot_be_made_is_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    result = demo("--out", tmp_path, "--tensorboard", tmp_path / "file" / "logs")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "--tensorboard" in result.stderr
    assert "Evaluating" not in result.output  # it shows before time is spent
