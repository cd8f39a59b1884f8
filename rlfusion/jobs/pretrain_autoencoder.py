"""The job of ``rlfusion pretrain-autoencoder``, and reading what it made.

A folder holds ``space.safetensors`` and ``autoencoder.json``: everything that is needed to build the autoencoder again,
and the SHA-256 of the weights. Draws are keyed by (seed, step).
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common import on_disk, shards, storage
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import integer, stream
from rlfusion.common.stops import Signals
from rlfusion.common.tensors import mean_features
from rlfusion.common.weights import sha256
from rlfusion.config import Autoencode
from rlfusion.data import Dataset, batch_indices, to_pixels
from rlfusion.data import load as load_data
from rlfusion.models import autoencoder
from rlfusion.models.autoencoder import FORMAT, KLVAE, UNSEALED, Latents, fitted, from_diffusers, negative_elbo
from rlfusion.rollout.ray_address import require_cluster
from rlfusion.training import checkpoint, fit, identity
from rlfusion.training.checkpoint import MALFORMED
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.learning_rate import cosine
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import Record, current
from rlfusion.training.tracking import grid, save_png

SHOWN = 40


class Learner:
    """Minimises -ELBO a pixel. ``update`` takes the number of the step."""

    def __init__(self, module: KLVAE, data: Dataset, config: Autoencode) -> None:
        self.module, self.config = module, config
        self.x = data.x.to(next(module.parameters()).device)
        self.optimization = Optimization(module, config.lr, ema=config.ema_decay, optimizer=config.optimizer)
        self.optimization.follow(cosine(config.steps, config.warmup))

    def update(self, batch: int) -> dict[str, float]:
        """One optimiser step: step number ``batch`` of the run.

        Raises:
            NumericalError: the gradient is not finite; the weights are as before.
        """
        size, ranks = self.config.batch, current()
        index = batch_indices(len(self.x), size, batch, self.config.seed, "autoencoder")
        x = self.x[torch.from_numpy(index).to(self.x.device)]

        def part(rows: Tensor) -> tuple[Tensor, Record]:
            some = x[rows.to(x.device)]
            mean, log_var = self.module.posterior(some)
            random = stream(self.config.seed, "autoencoder", batch)
            noise = torch.from_numpy(random.standard_normal((size, *mean.shape[1:]), dtype=np.float32))[rows].to(mean)
            guess = self.module(mean + (log_var / 2).exp() * noise)
            loss = negative_elbo(some, guess, mean, log_var, self.module.noise)
            return loss.sum() / size / x[0].numel(), {"loss": loss, "error": mean_features((some - guess).square())}

        records = ranks.accumulate(self.module, ranks.share(torch.arange(size), size), size, part)
        loss, error = (torch.cat([record[name] for record in records]).mean() for name in ("loss", "error"))
        shown = {"negative_elbo": (loss / x[0].numel()).item(), "error": error.sqrt().item()}
        return shown | {"grad_norm": self.optimization.step()}

    def state_dict(self) -> dict:
        return self.optimization.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.optimization.load_state_dict(state)


def check(config: Autoencode) -> None:
    """Refuse what cannot work, before any work.

    Raises:
        ConfigError: says which setting and why.
        RolloutError: no Ray cluster answers at its address.
    """
    pick_device(config.device)
    if config.learner.ranks:
        require_cluster(config.ray.address, config.ray.connect_timeout_s)
    data = load_data(config.data, config.size)
    _build(config, data.shape)
    data.require_parts(config.held_out)


def run(config: Autoencode, folder: Path, signals: Signals, progress: Progress) -> dict[str, float]:
    """The whole job in ``folder``, from its newest checkpoint on if it has one; leaves ``folder/autoencoder``.

    Returns:
        error: root mean squared error of held-out pixels in [0, 1]; latent_std: of the held-out latents.
    """
    device = pick_device(config.device)
    set_numerics(config.threads, device)
    data, held_out = load_data(config.data, config.size, progress.say).split(config.held_out)
    module = _build(config, data.shape)
    if config.learner.split:
        split(module, device)
    module.to(device)
    with current().in_turn():
        run = identity.enter(folder, "pretrain-autoencoder", config, checkpoint.NEWEST)
    run.require_inputs({"data": data.sha256})
    learner = Learner(module, data, config)
    shown = fit.Shown("autoencoder", "autoencoder", "error")
    tracker = fit.fit(learner, run, config.steps, config.checkpoint_every, signals, progress, shown)
    with learner.optimization.ema.averaged():
        module = shards.gathered(module, here=not current().rank)
        if current().rank:
            return {}  # the first rank looks at the result
        about = {"kind": "kl", "shape": list(data.shape), "config": asdict(config.model)}
        space = fitted(module, about, data.x)
        save(folder / "autoencoder", space)
        result = _evaluate(space, held_out, folder)
    tracker.scalars(config.steps, "evaluation", result)
    checkpoint.write_json_atomic(folder / "evaluation.json", result)
    return result


def split(module: KLVAE, device: torch.device) -> None:
    """Give each rank its rows of the two networks, which are called one after the other."""
    for net in (module.encoder, module.decoder):
        shards.split(net, device, current().exact)


def _build(config: Autoencode, shape: tuple[int, ...]) -> KLVAE:
    state = torch.get_rng_state()
    torch.manual_seed(integer(config.seed, "initial weights"))
    with on_disk.parameters(config.learner.split):
        module = KLVAE(shape, config.model)
    torch.set_rng_state(state)
    return module


def _evaluate(space: Latents, held_out: Dataset, folder: Path) -> dict[str, float]:
    """How well held-out samples come back, and a picture: samples above their reconstructions."""
    z = space.encode(held_out.x)
    back = space.decode(z).cpu()
    pixels = to_pixels(held_out.x)
    pairs = torch.stack([part[:SHOWN] for part in (pixels, back)], 1).flatten(0, 1)
    save_png(folder / "samples" / "reconstructions.png", grid(_interleaved(pairs), 20))
    return {"error": (back - pixels).square().mean().sqrt().item(), "latent_std": z.std().item()}


def _interleaved(pairs: Tensor) -> Tensor:
    """(x1, y1, x2, y2, ...) as rows of 20: samples, then what came back of them."""
    parts = [pairs[i : i + 40] for i in range(0, len(pairs), 40)]
    return torch.cat([half for part in parts for half in (part[::2], part[1::2])])


def save(folder: Path, space: Latents) -> None:
    """Write an autoencoder's folder; each file appears whole or not at all."""
    storage.make_folder(folder)
    blob = models.space_blob(space)["space"]
    about = models.sealed({"format": FORMAT, **space.about, "sha256": sha256(blob)})
    for name, content in (("space.safetensors", blob), ("autoencoder.json", about)):
        storage.write(folder / name, content)


def load(path: Path) -> Latents:
    """The autoencoder in ``path``: a run of ``pretrain-autoencoder``, its ``autoencoder`` folder, or one of diffusers.

    Raises:
        ConfigError: none there, a description that cannot be understood, or weights that are not the saved ones.
    """
    for folder in (path, path / "autoencoder"):
        if (folder / "autoencoder.json").is_file():
            return _load_own(folder)
    if (path / "config.json").is_file():
        return from_diffusers(str(path))
    raise ConfigError(
        f"autoencoder = {str(path)!r}: expected a run of pretrain-autoencoder, or a folder of diffusers' AutoencoderKL"
    )


def _load_own(folder: Path) -> Latents:
    """What ``save`` wrote."""
    file = folder / "autoencoder.json"
    try:
        about = json.loads(file.read_text())
        if about.get("format") not in (FORMAT, UNSEALED):
            raise ConfigError(f"{str(file)!r} is of another format: expected {FORMAT!r}")
        if about.pop("format") == FORMAT:
            models.require_seal({"format": FORMAT, **about}, file)
        about.pop("seal", None)
        stated = about.pop("sha256")
        space = autoencoder.build(about)
    except ConfigError:
        raise
    except (*MALFORMED, RuntimeError) as error:
        raise ConfigError(f"{str(file)!r} is no autoencoder's description: {type(error).__name__}: {error}") from error
    models.load_into(space.module, folder / "space.safetensors", stated)
    return space
