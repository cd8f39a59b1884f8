"""The pictures of the documentation, each made from what runs have left.

    python benchmarks/pictures.py chain --run runs/film       # docs/pictures/chain.svg: one walk
    python benchmarks/pictures.py film --run runs/film        # docs/training.gif: a grid through training

``film`` needs a run whose monitor looked often: rlfusion finetune --monitor.every 1 --name film.
"""

import argparse
import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def chain(run: Path, out: Path = ROOT / "docs" / "pictures" / "chain.svg", label: str = "0", seed: int = 4) -> None:
    """One walk of a model: its states as pictures, from noise to the sample."""
    import rlfusion as rlf

    model = rlf.load(run)
    times = model.times
    cond = torch.tensor([model.names.index(label)])
    noise = rlf.chain_noise((seed,), [0], len(times) - 1, model.shape)
    with torch.no_grad():
        states = [noise[:, 0], *(step.x for step in rlf.walk(model.policy, noise, times, cond))]
    shown = [states[round(i)] for i in np.linspace(0, len(states) - 1, 6)]
    out.write_text(_drawn([_png(state[0]) for state in shown], len(times) - 1, label))


def _png(state: torch.Tensor) -> str:
    """A state of one channel in [-1, 1], or noise beyond, as a PNG in base64."""
    pixels = ((state[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def _drawn(pictures: list[str], steps: int, label: str) -> str:
    names = ["x_T: noise", "x_t: state", "x_s: action, next state", "...", "...", "x_0: sample"]
    parts = []
    for i, (picture, name) in enumerate(zip(pictures, names)):
        x = 20 + 152 * i
        parts.append(
            f'<image x="{x}" y="44" width="104" height="104" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{picture}"/><text x="{x + 52}" y="168" text-anchor="middle">{name}</text>'
        )
        if i:
            parts.append(f'<path d="M{x - 44} 96 L{x - 5} 96" stroke="#444" stroke-width="1.5" marker-end="url(#c)"/>')
            parts.append(f'<text x="{x - 25}" y="84" text-anchor="middle" class="p">policy</text>')
            reward = "reward R(x_0, c)" if i == len(pictures) - 1 else "0"
            parts.append(f'<text x="{x + 52}" y="190" text-anchor="middle" class="r">{reward}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 205" font-family="sans-serif" font-size="13" '
        'role="img" aria-label="One walk of the chain, from noise to a sample">\n'
        "<style>.p{fill:#3f51b5;font-size:11px}.r{fill:#b26a00}</style>\n"
        '<rect width="940" height="205" fill="#fff"/>\n'
        '<defs><marker id="c" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#444"/></marker></defs>\n'
        f'<text x="20" y="26">One walk, asked for a {label}: six of its {steps + 1} states. Every step is a draw of a '
        "Gaussian whose mean is the model's.</text>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def film(run: Path, out: Path = ROOT / "docs" / "training.gif", frames: int = 18) -> None:
    """The monitor's samples on fixed noise, through the training of a run, as a GIF that moves.

    Raises:
        SystemExit: the run has kept no such pictures.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    if "samples/training" not in events.Tags()["images"]:
        raise SystemExit(f"{run}: no pictures 'samples/training', expected a run with --monitor.every 1")
    seen = events.Images("samples/training")
    chosen = [seen[round(i)] for i in np.linspace(0, len(seen) - 1, min(frames, len(seen)))]
    pictures = [_frame(event.encoded_image_string, event.step, seen[-1].step) for event in chosen]
    times = [900] + [140] * (len(pictures) - 2) + [2200]
    pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)


def _frame(picture: bytes, step: int, last: int) -> Image.Image:
    """One grid in 16 colours, with a bar below it that says how far the training is."""
    grid = Image.open(io.BytesIO(picture)).convert("L").quantize(14, dither=Image.Dither.NONE).convert("RGB")
    frame = Image.new("RGB", (grid.width, grid.height + 8), "white")
    frame.paste(grid, (0, 0))
    frame.paste((63, 81, 181), (0, grid.height + 2, round(grid.width * step / last), grid.height + 8))
    return frame.quantize(16, dither=Image.Dither.NONE)


def _asked() -> tuple[Callable[..., None], dict[str, Path]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["chain", "film"])
    parser.add_argument("--run", type=Path, required=True, help="its folder")
    asked = parser.parse_args()
    return globals()[asked.what], {"run": asked.run}


if __name__ == "__main__":
    made, arguments = _asked()
    made(**arguments)
