"""What a run writes while it works: ``metrics.jsonl``, TensorBoard events, pictures. The one room of TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


class Tracker:
    """Scalars and pictures of one run, by step, into ``folder``.

    Steps count the updates done. A run that resumes with ``step`` done first forgets what was written for later ones
    (with 0 done, all), and what is written again for earlier ones is dropped, so that no step is there twice.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = folder / "metrics.jsonl"
        self._kept = self._truncate(step)
        self._lines = self.file.open("a")
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0, max_queue=1000, flush_secs=20)

    def _truncate(self, step: int) -> set[str]:
        """Keep the whole lines up to ``step``, none for 0, and return them."""
        if not self.file.exists():
            return set()
        whole = [line for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if 0 < step >= json.loads(line)["step"]]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.file)
        return set(kept)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and one TensorBoard scalar ``group/name`` each."""
        line = json.dumps({"step": step, **{f"{group}/{k}": v for k, v in values.items()}}) + "\n"
        if line in self._kept:
            return
        self._lines.write(line)
        self._lines.flush()
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """A picture (C, H, W) in [0, 1]."""
        self._writer.add_image(name, picture, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text, as Markdown."""
        self._writer.add_text(name, text, step)

    def hparams(self, settings: dict[str, bool | str | float | int], metrics: dict[str, float]) -> None:
        """The run's settings beside its final metrics, for TensorBoard's HPARAMS page."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(settings, metrics):
            self._writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value)

    def flush(self) -> None:
        """Write out what is held back: before a checkpoint says that these steps are done."""
        self._writer.flush()

    def close(self) -> None:
        """Write out what is held back, and end."""
        self._lines.close()
        self._writer.close()


def overlay(folder: Path, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    """Add scalars to a run's events by tag, each with its own horizontal axis: [(step, value), ...]."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=".overlay") as writer:
        for tag, points in curves.items():
            for step, value in sorted(points):
                writer.add_scalar(tag, value, step)


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


def save_png(path: Path, picture: Tensor) -> None:
    """Write a picture (1 or 3, H, W) in [0, 1] as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)


def flatten(config: dict, prefix: str = "") -> dict[str, bool | str | float | int]:
    """Nested settings as dotted names with plain values, as TensorBoard's hparams want them."""
    flat: dict[str, bool | str | float | int] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | str | float | int) else str(value)
    return flat
