"""What a run writes: metrics.jsonl cut back on resume, TensorBoard files read by TensorBoard itself, grids by hand."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rlfusion.training.tracking import Tracker, flatten, grid, save_png


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder, last: int) -> None:
    tracker = Tracker(folder)
    for step in range(last + 1):
        tracker.scalars(step, "train", {"loss": 1 / (step + 1)})


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_a_line_says_its_step_and_names(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.scalars(3, "train", {"loss": 0.1, "reward": -2.0})
    assert lines(tmp_path) == [{"step": 3, "train/loss": 0.1, "train/reward": -2.0}]  # at once, before it is closed


@pytest.mark.parametrize("tail", ["", '{"step": 3, "train/lo', '{"step": 7}', "{"])
def test_resuming_forgets_later_steps_and_a_half_written_line(tmp_path, tail):
    written(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    tracker = Tracker(tmp_path, step=3)
    tracker.scalars(4, "train", {"loss": 9.0})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        *((step, 1 / (step + 1)) for step in range(4)),
        (4, 9.0),
    ]


def test_starting_again_with_nothing_done_forgets_all(tmp_path):
    written(tmp_path, 2)
    Tracker(tmp_path, step=0)
    assert lines(tmp_path) == []


def test_what_is_measured_again_after_a_resume_is_not_there_twice(tmp_path):
    written(tmp_path, 3)
    tracker = Tracker(tmp_path, step=3)
    tracker.scalars(3, "train", {"loss": 1 / 4})
    tracker.scalars(3, "evaluation", {"reward": 1.0})
    assert [set(line) - {"step"} for line in lines(tmp_path) if line["step"] == 3] == [
        {"train/loss"},
        {"evaluation/reward"},
    ]


def test_tensorboard_reads_scalars_and_forgets_what_a_resumed_run_repeats(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (1, 2, 3, 4):
        tracker.scalars(step, "train", {"loss": float(step)})
    resumed = Tracker(tmp_path, step=2)
    resumed.scalars(3, "train", {"loss": 30.0})
    events = read(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_reads_the_picture_that_was_given(tmp_path):
    picture = torch.linspace(0, 1, 3 * 4 * 5).reshape(3, 4, 5)
    tracker = Tracker(tmp_path)
    tracker.image(7, "samples", picture)
    (event,) = read(tmp_path).Images("samples")
    (tmp_path / "held.png").write_bytes(event.encoded_image_string)
    held = np.asarray(Image.open(tmp_path / "held.png")).transpose(2, 0, 1)
    assert event.step == 7
    assert np.abs(held / 255 - picture.numpy()).max() <= 1 / 255


def test_tensorboard_reads_settings_and_their_final_metrics(tmp_path):
    tracker = Tracker(tmp_path)
    settings = {"agent.lr": 1e-3, "reward": "ink", "guided": True}
    tracker.row(settings, settings | {"with window": 3}, ["final/reward", "final/queries to the goal"])
    tracker.results({"final/reward": 0.5, "final/queries to the goal": None})
    events = read(tmp_path)
    columns = HParamsPluginData.FromString(events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content)
    assert [info.name.tag for info in columns.experiment.metric_infos] == ["final/reward", "final/queries to the goal"]
    assert {info.name for info in columns.experiment.hparam_infos} == {*settings, "with window"}
    assert events.Tags()["scalars"] == ["final/reward"]  # what was never reached has a column, and no value
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    held = HParamsPluginData.FromString(content).session_start_info.hparams
    assert held.keys() == settings.keys()
    assert held["agent.lr"].number_value == pytest.approx(1e-3)
    assert held["reward"].string_value == "ink"
    assert held["guided"].number_value == 1  # torch writes a bool as a number
    assert events.Scalars("final/reward")[0].value == 0.5


def test_a_grid_laid_out_by_hand():
    samples = torch.tensor([0.0, 0.25, 0.75]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    expected = [
        [0.0, 0.0, 0.5, 0.25, 0.25],
        [0.0, 0.0, 0.5, 0.25, 0.25],
        [0.5, 0.5, 0.5, 0.5, 0.5],
        [0.75, 0.75, 0.5, 0.5, 0.5],
        [0.75, 0.75, 0.5, 0.5, 0.5],
    ]
    assert torch.equal(grid(samples, columns=2, scale=1), torch.tensor([expected]))
    large = grid(samples, columns=2, scale=3)
    assert large.shape == (1, 15, 15)
    assert torch.equal(large[:, 1::3, 1::3], torch.tensor([expected]))


def test_a_grid_keeps_rows_columns_and_channels_in_place():
    samples = torch.rand(4, 3, 2, 5)
    picture = grid(samples, columns=2, scale=1, gap=0)
    assert picture.shape == (3, 4, 10)
    assert torch.equal(picture[:, :2, 5:], samples[1])
    assert torch.equal(picture[:, 2:, :5], samples[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_rounded_levels(tmp_path, channels):
    levels = torch.arange(channels * 20).reshape(channels, 4, 5)
    save_png(tmp_path / "new" / "x.png", levels / 255)
    held = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    assert np.array_equal(held, levels.permute(1, 2, 0).numpy().squeeze())


def test_settings_flatten_to_dotted_plain_values():
    nested = {"a": 1, "b": {"c": 2.5, "d": {"e": "x", "f": None}}, "g": {}, "h": [1, 2]}
    assert flatten(nested) == {"a": 1, "b.c": 2.5, "b.d.e": "x", "b.d.f": "None", "g": "{}", "h": "[1, 2]"}


def test_nothing_temporary_is_left(tmp_path):
    written(tmp_path, 2)
    Tracker(tmp_path, step=1)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
