"""Where the seconds and the FLOPs of training go: by a clock that is told, and against products counted by hand."""

import json
import math
import threading
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from rlfusion.cli.cluster_jobs import told
from rlfusion.common.stops import Signals
from rlfusion.training import flops
from rlfusion.training.flops import Flops, passes, peak, peak_of
from rlfusion.training.loop import train
from rlfusion.training.stages import CHECKPOINT, LEARN, Stages, counting, stage
from rlfusion.training.timing import Stopwatch, derived
from rlfusion.training.tracking import Tracker


class Clock:
    """A clock that is told the time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_second_belongs_to_the_innermost_stage():
    clock = Clock()
    with counting(Stages(clock)) as stages:
        clock.now += 1
        with stage("rollout"):
            clock.now += 2
            with stage("reward"):
                clock.now += 4
            clock.now += 8
        clock.now += 16
        with stage("reward"):
            clock.now += 32
    assert stages.taken() == {"rollout": 10, "reward": 36}
    assert stages.taken() == {}


def test_a_stage_that_fails_is_over_and_one_that_is_cut_is_counted_on_both_sides():
    clock = Clock()
    stages = Stages(clock)

    def fail() -> None:
        with counting(stages), stage("learn"):
            clock.now += 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now += 5
    with stages.stage("learn"):
        clock.now += 7
        assert stages.taken() == {"learn": 10}
        clock.now += 11
    assert stages.taken() == {"learn": 11}


def test_what_nobody_counts_and_other_threads_are_left_alone():
    with stage("learn"):
        pass
    clock = Clock()

    def other() -> None:
        with stage("reward"):
            clock.now += 9

    with counting(Stages(clock)) as stages, stage("rollout"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert stages.taken() == {"rollout": 9}


def test_the_loop_says_what_it_spends_on_learning_and_on_checkpoints():
    clock = Clock()

    class Learner:
        def update(self, batch):
            clock.now += batch
            return {"loss": 0.0}

    def save(done: int) -> None:
        clock.now += 100

    with Signals() as signals, counting(Stages(clock)) as stages:
        for _ in train(Learner(), iter([1, 2, 4]), 0, 3, 2, save, signals):
            clock.now += 1000
    assert stages.taken() == {LEARN: 7, CHECKPOINT: 200}


def test_figures_by_hand():
    found = derived(10.0, {"idle": 2.5, "learn": 4.0}, 50, 6e9, 1e10)
    assert found == {
        "seconds/idle": 2.5,
        "seconds/learn": 4.0,
        "utilisation": 0.75,
        "samples_per_second": 5.0,
        "flops_per_second": 1.5e9,
        "mfu": 0.15,
    }
    nan = math.nan
    assert derived(10.0, {"learn": 4.0}, 50, 6e9, nan).keys() == found.keys() - {"seconds/idle", "mfu"}
    assert derived(10.0, {"learn": 4.0}, nan, nan, nan).keys() == {"seconds/learn", "utilisation"}
    assert derived(0.0, {}, nan, nan, nan) == {}


def test_what_it_takes_to_count_is_not_training(tmp_path):
    class Slow(Flops):
        def taken(self) -> float:
            time.sleep(0.3)
            return 1.0

    watch = Stopwatch(tmp_path, 0)
    watch.lap(1, 1, {"learn": 1.0}, 1.0, Slow(nn.Linear(1, 1), 2.0))
    watch.lap(2, 2)
    assert watch.seconds < 0.25


def test_a_lap_is_written_with_its_figures_and_none_of_them_is_a_metric(tmp_path):
    watch, tracker = Stopwatch(tmp_path, 0), Tracker(tmp_path)
    moved = {"weights_to_workers": 3_000_000, "walks_to_rank": 500}
    tracker.timing(3, watch.lap(3, 120, {"learn": 0.5}, 40.0, moved=moved))
    (line,) = map(json.loads, (tmp_path / "timing.jsonl").read_text().splitlines())
    assert line["seconds/learn"] == 0.5
    assert line.keys() >= {"step", "queries", "seconds", "cpu_seconds", "utilisation", "samples_per_second"}
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("timing/seconds/learn")] == [3]
    assert told(tmp_path)[0][1].startswith("3 updates, 120 queries")
    assert ("stages", "learn 0.5 s") in told(tmp_path)
    assert line["bytes/weights_to_workers"] == 3e6
    assert [event.value for event in events.Scalars("timing/bytes/walks_to_rank")] == [500]
    assert ("moved", "weights to workers 3 MB, walks to rank 0.0005 MB") in told(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"step": 2}\n{"st', '{"step": 2, "queries": 1, "seconds": "x"}'])
def test_the_status_of_a_job_reads_whatever_is_there(tmp_path, text):
    assert told(tmp_path) == []
    (tmp_path / "timing.jsonl").write_text(text)
    assert told(tmp_path) == []


class Net(nn.Module):
    """Two products a row: 6 x 5 and 5 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, cond):
        self.calls += 1
        return self.b(self.drop(self.a(x) + t[:, None] + cond["shift"]))


def row(rows: int = 4):
    return torch.randn(rows, 6), torch.rand(rows), {"shift": torch.randn(rows, 5)}


FORWARD = 2 * (6 * 5 + 5 * 3)
BACKWARD = 2 * 6 * 5 + 2 * 2 * 5 * 3
"""Gradients of both weights, and of what the second layer is given."""


def test_the_flops_of_a_row_are_those_of_its_products():
    net = Net()
    assert passes(net, *(part[:1] if isinstance(part, torch.Tensor) else row(1)[2] for part in row())) == (
        FORWARD,
        BACKWARD,
    )
    for p in net.parameters():
        p.requires_grad_(False)
    assert passes(net, *row(1)) == (FORWARD, 0)


def test_the_flops_of_an_update_are_those_of_its_rows_and_nothing_is_changed():
    net = Net().train()
    counter = Flops(net, 1e9)
    with counter.counting():
        net(*row(4)).sum().backward()
        with torch.no_grad():
            net(*row(7))
        net(*row(3))
    net(*row(100))  # not an update's
    calls, grads = net.calls.clone(), [p.grad.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    assert counter.taken() == 7 * (FORWARD + BACKWARD) + 7 * FORWARD
    assert counter.taken() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.calls, calls)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads))
    assert not net._forward_pre_hooks


def test_they_are_counted_once(monkeypatch):
    net, asked = Net(), []
    monkeypatch.setattr(flops, "passes", lambda *given: asked.append(given) or (1.0, 2.0))
    counter = Flops(net, 1e9)
    assert counter.taken() == 0
    for _ in range(3):
        with counter.counting():
            net(*row(5))
        assert counter.taken() == 15
    assert len(asked) == 1
    assert [len(part) for part in asked[0][1:3]] == [1, 1]


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14, 6.7e13),
        ("NVIDIA H100 PCIe", 7.56e14, 5.1e13),
        ("NVIDIA H200", 9.89e14, 6.7e13),
        ("NVIDIA A100-SXM4-80GB", 3.12e14, 1.95e13),
        ("NVIDIA A10G", 7.0e13, 3.1e13),
        ("NVIDIA A10", 1.25e14, 3.12e13),
        ("NVIDIA L4", 1.21e14, 3.03e13),
        ("NVIDIA L40S", 3.62e14, 9.16e13),
        ("NVIDIA GeForce RTX 4090", 1.65e14, 8.26e13),
    ],
)
def test_peaks_by_name(name, half, single):
    assert (peak_of(name, "bfloat16"), peak_of(name, "float32")) == (half, single)


@pytest.mark.parametrize("name", ["NVIDIA L400", "Tesla V100-SXM2-16GB", "", "RTX", "AMD Instinct MI300X"])
def test_a_gpu_that_is_not_known_has_no_peak(name):
    assert math.isnan(peak_of(name, "bfloat16"))


def test_a_cpu_has_no_peak():
    assert math.isnan(peak(torch.device("cpu"), "float32"))


def test_where_the_peak_is_not_known_nothing_is_counted():
    net = Net()
    counter = Flops(net, math.nan)
    with counter.counting():
        assert not net._forward_pre_hooks
        net(*row())
    assert math.isnan(counter.taken())
