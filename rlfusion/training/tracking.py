"""What a run writes while it works: ``metrics.jsonl``, TensorBoard events, pictures. The one room of TensorBoard."""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfusion.common import storage
from rlfusion.common.jsonl import read_lines
from rlfusion.training.trackers.beside import Beside

BINS = 30
Cells = dict[str, bool | str | float | int]
"""Plain values by name."""


class Events:
    """A file of TensorBoard events in ``folder``; each event is there whole, or the error of its writing is raised.

    (TensorBoard's own writer writes in a thread, and is lost with all that it holds when a disk is full for a moment.)
    """

    count = 0

    def __init__(self, folder: Path, suffix: str = "") -> None:
        Events.count += 1
        owner = f"{socket.gethostname()}.{os.getpid()}.{Events.count}"
        self.file = folder / f"events.out.tfevents.{int(time.time()):010d}.{owner}{suffix}"
        self.add(None, file_version="brain.Event:2")

    def add(self, step: int | None, **fields: Any) -> None:
        """One event: the fields of TensorBoard's ``Event``.

        Raises:
            StorageError: it cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = BytesIO()
        RecordWriter(framed).write(Event(wall_time=time.time(), step=step, **fields).SerializeToString())
        storage.append(self.file, framed.getvalue())

    def scalars(self, step: int | None, values: Mapping[str, float]) -> None:
        """Scalars by tag."""
        from torch.utils.tensorboard import summary

        parts = [summary.scalar(tag, value) for tag, value in values.items()]
        if parts:
            for part in parts[1:]:
                parts[0].MergeFrom(part)
            self.add(step, summary=parts[0])


class Tracker:
    """Scalars and pictures of one run, by step, into ``folder``.

    Steps count the updates done. A run that resumes with ``step`` done first forgets what was written for later ones
    (with 0 done, all), and what is written again for earlier ones is dropped, so that no step is there twice.
    ``damaged`` lines, beside one that was cut short, are counted and left out. The trackers ``beside`` are told the
    same, but for histograms.
    """

    def __init__(self, folder: Path, step: int = 0, beside: Beside | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.file = folder / "metrics.jsonl"
        self.damaged = 0
        self._beside = beside or Beside()
        self._kept = self._truncate(step)
        self._events = Events(folder)
        self._events.add(
            step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START)
        )  # later ones are void

    def _truncate(self, step: int) -> set[str]:
        """Keep the whole lines up to ``step``, none for 0, and return them; the last one may have been cut short."""
        lines, bad = read_lines(self.file)
        self.damaged = max(0, bad - 1) if step else 0
        self._beside.resumed(lines, step)
        kept = [f"{line}\n" for line, record in lines if 0 < step >= record["step"]]
        storage.write(self.file, "".join(kept))
        return set(kept)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and one TensorBoard scalar ``group/name`` each."""
        named = {f"{group}/{k}": v for k, v in values.items()}
        line = json.dumps({"step": step, **named}) + "\n"
        if line in self._kept:
            return
        storage.append(self.file, line)
        self._events.scalars(step, named)
        self._beside.scalars(step, line, named)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """TensorBoard scalars ``timing/name``: of the machine, so none of metrics.jsonl."""
        named = {f"timing/{name}": value for name, value in values.items()}
        self._events.scalars(step, named)
        self._beside.beside(step, named)

    def image(self, step: int, name: str, picture: Tensor, prompts: Sequence[str] = ()) -> None:
        """A picture (C, H, W) in [0, 1]; of a grid of samples with the ``prompts`` of its columns."""
        from torch.utils.tensorboard import summary

        self._events.add(step, summary=summary.image(name, picture, dataformats="CHW"))
        self._beside.image(step, name, levels(picture), prompts)

    def counts(self, step: int, name: str, counts: Mapping[int, int]) -> None:
        """A histogram of whole numbers: how often each was seen."""
        from torch.utils.tensorboard import summary

        values = sorted(counts)
        numbers = [counts[value] for value in values]
        self._events.add(
            step,
            summary=summary.histogram_raw(
                name,
                min=values[0],
                max=values[-1],
                num=sum(numbers),
                sum=sum(value * counts[value] for value in values),
                sum_squares=sum(value**2 * counts[value] for value in values),
                bucket_limits=[value + 0.5 for value in values],
                bucket_counts=numbers,
            ),
        )

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """How some numbers, NaN aside, lie: BINS equal parts from the least to the greatest."""
        from torch.utils.tensorboard import summary

        fine = values.detach().double().flatten().cpu()
        fine = fine[fine.isfinite()]
        if len(fine):
            counts, limits = np.histogram(fine.numpy(), BINS)
            about = {"min": fine.min().item(), "max": fine.max().item(), "num": len(fine)}
            about |= {"sum": fine.sum().item(), "sum_squares": fine.square().sum().item()}
            bars = {"bucket_limits": limits[1:].tolist(), "bucket_counts": counts.tolist()}
            self._events.add(step, summary=summary.histogram_raw(name, **about, **bars))

    def layout(self, charts: Mapping[str, Mapping[str, list[str]]]) -> None:
        """The charts of TensorBoard's CUSTOM SCALARS: {group: {chart: tags as regular expressions}}."""
        from torch.utils.tensorboard import summary

        groups = {group: {n: ["Multiline", tags] for n, tags in of.items()} for group, of in charts.items()}
        self._events.add(0, summary=summary.custom_scalars(groups))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, as Markdown."""
        from torch.utils.tensorboard import summary

        self._events.add(step, summary=summary.text(name, text))
        self._beside.text(name, text)

    def row(self, settings: Cells, columns: Cells, metrics: Iterable[str]) -> None:
        """The run's row of TensorBoard's HPARAMS, without its metrics: ``columns`` are those of the page by name, each
        with a value of its kind, ``metrics`` the names of those to come (``results``).
        """
        from torch.utils.tensorboard.summary import hparams

        page, _, _ = hparams(columns, dict.fromkeys(metrics))
        _, start, _ = hparams(settings, {})
        for summary in (page, start):
            self._events.add(None, summary=summary)

    def results(self, metrics: Mapping[str, float | None]) -> None:
        """The metrics of the run's row of HPARAMS, which is done; None for what has no value."""
        from torch.utils.tensorboard.summary import hparams

        _, _, end = hparams({}, {})
        self._events.add(None, summary=end)
        known = {name: value for name, value in metrics.items() if value is not None}
        self._events.scalars(None, known)
        self._beside.summary(known)


def overlay(folder: Path, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    """Add scalars to a run's events by tag, each with its own horizontal axis: [(step, value), ...]."""
    events = Events(folder, ".overlay")
    for tag, points in curves.items():
        for step, value in sorted(points):
            events.scalars(step, {tag: value})


def grid(samples: Tensor, columns: int, scale: int = 4, gap: int = 1) -> Tensor:
    """Samples (N, C, H, W) in [0, 1] as one picture (C, *, *), row by row, enlarged by whole pixels."""
    n, c, h, w = samples.shape
    rows = -(-n // columns)
    canvas = torch.full((rows * columns, c, h + gap, w + gap), 0.5)
    canvas[:n, :, :h, :w] = samples.detach().cpu()
    picture = canvas.reshape(rows, columns, c, h + gap, w + gap).permute(2, 0, 3, 1, 4)
    picture = picture.reshape(c, rows * (h + gap), columns * (w + gap))
    picture = picture[:, : rows * (h + gap) - gap, : columns * (w + gap) - gap]
    return picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def levels(picture: Tensor) -> np.ndarray:
    """A picture (C, H, W) in [0, 1] as (H, W, C) of 8-bit levels."""
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def save_png(path: Path, picture: Tensor) -> None:
    """Write a picture (1 or 3, H, W) in [0, 1] as PNG."""
    from PIL import Image

    pixels = levels(picture)
    png = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(png, format="PNG")
    storage.make_folder(path.parent)
    storage.write(path, png.getvalue())


def flatten(config: dict, prefix: str = "") -> Cells:
    """Nested settings as dotted names with plain values, as TensorBoard's hparams want them."""
    flat: Cells = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | str | float | int) else str(value)
    return flat
