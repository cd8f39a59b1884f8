"""The job of ``rlfusion train-clip``: a small CLIP of images and their labels' words or captions.

    (1)  s_ij = exp(l) cos(f(x_i), g(y_j)),   x_i the images of a batch, y_j a text for each label among them, l learned
    (2)  loss = 1/2 mean_i [-log softmax_j s_ij]_{j = label of i} + 1/2 mean_j mean_{i of label j} [-log softmax_i s_ij]

With one image a text Eq. (2) is the loss of Radford et al. (2021); images that share a label are no negatives of each
other's text. The text is drawn among the templates at each step. A run leaves ``clip/``, a folder of open_clip's kind,
for the CLIP rewards (``--reward_options '{clip_score: {model: runs/NAME}}'``) and for open_clip itself (local-dir:).
Draws are keyed by (seed, step).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import integer, stream
from rlfusion.common.stops import Signals, in_force
from rlfusion.config import TrainClip
from rlfusion.data import Dataset, batch_indices, to_pixels
from rlfusion.data import load as load_data
from rlfusion.evaluation.classifier import augment, one_thread
from rlfusion.rewards.clip import towers
from rlfusion.rewards.clip.preprocessing import Preprocess
from rlfusion.rewards.clip.texts import SPELLED, fill_all
from rlfusion.training import checkpoint, identity
from rlfusion.training import fit as fitting
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.folders import locked
from rlfusion.training.optimization import Optimization

FORMAT, WARM_UP = 1, 0.1
HANDWRITTEN = ("a handwritten {word}", "a picture of a {word}", "the digit {word}", "{word}", "{}")
ANY = ("a picture of {}", "{}")
COLDEST = math.log(100)
"""The largest l: exp(l) is at most 100, as in Radford et al."""


def templates_of(given: Sequence[str], data: Dataset) -> tuple[str, ...]:
    """The templates, by default those that suit the names of the data; the first is what the CLIP is asked with."""
    if given or data.captioned:
        return tuple(given) or ("{}",)
    return HANDWRITTEN if all(name in SPELLED for name in data.names) else ANY


def loss(images: Tensor, texts: Tensor, place: Tensor, scale: Tensor) -> Tensor:
    """Eq. (2) of unit vectors images (B, D), texts (T, D), place (B,) the text of each image, scale () = exp(l)."""
    s = scale * images @ texts.T
    of = F.one_hot(place, len(texts)).to(s)
    to_text = F.cross_entropy(s, place)
    to_image = -(of * s.log_softmax(0)).sum(0) / of.sum(0)
    return (to_text + to_image.mean()) / 2


def rate(done: float) -> float:
    """The learning rate's course over a share in [0, 1) of the training: up along a line, then down along a cosine."""
    return min(done / WARM_UP, 0.5 * (1 + math.cos(math.pi * done)))


class Learner:
    """Minimises Eq. (2). ``update`` takes the number of the step."""

    def __init__(self, clip: nn.Module, preprocess: Preprocess, data: Dataset, config: TrainClip) -> None:
        self.clip, self.preprocess, self.config = clip, preprocess, config
        device = next(clip.parameters()).device
        self.x, self.label = to_pixels(data.x).to(device), data.label.to(device)
        tokens = towers.tokenizer(config.model.context)
        texts = fill_all(templates_of(config.templates, data), data.names)
        self.tokens = torch.stack([tokens(of_one) for of_one in texts]).to(device)  # (templates, P, length)
        self.optimization = Optimization(
            clip, config.lr, config.weight_decay, ema=config.ema_decay, optimizer=config.optimizer
        )
        self.optimization.follow(lambda n: rate(n / config.steps))

    def update(self, batch: int) -> dict[str, float]:
        """One optimiser step: step number ``batch`` of the run.

        Raises:
            NumericalError: the gradient is not finite; the weights are as before.
        """
        c, at = self.config, batch_indices(len(self.x), self.config.batch, batch, self.config.seed, "clip")
        at = torch.from_numpy(at).to(self.x.device)
        x = augment(self.x[at].cpu(), c.shift, c.noise, stream(c.seed, "clip", batch, "augment")).to(self.x)
        present, place = self.label[at].unique(return_inverse=True)
        drawn = stream(c.seed, "clip", batch, "template").integers(len(self.tokens), size=len(present))
        images = self.clip.encode_image(self.preprocess(x), normalize=True)
        texts = self.clip.encode_text(self.tokens[torch.from_numpy(drawn).to(present), present], normalize=True)
        value = loss(images, texts, place, self.clip.logit_scale.clamp(max=COLDEST).exp())
        value.backward()
        return {"loss": value.item(), "grad_norm": self.optimization.step()}

    def state_dict(self) -> dict:
        return self.optimization.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.optimization.load_state_dict(state)


def check(config: TrainClip) -> None:
    """Refuse what cannot work, before any work.

    Raises:
        ConfigError: says which setting and why.
    """
    pick_device(config.device)
    data = load_data(config.data, config.size)
    fill_all(templates_of(config.templates, data), data.names)
    config.model.described(data.shape)
    data.require_parts(config.held_out)
    if data.classes < 2:
        raise ConfigError(f"data = {config.data!r} has one label: expected two, or captions, to tell apart")


def run(config: TrainClip, folder: Path, signals: Signals, progress: Progress) -> dict[str, float]:
    """The whole job in ``folder``, from its newest checkpoint on if it has one; leaves ``folder/clip``.

    Returns:
        zero_shot: the share of held-out images whose own label's text is the nearest of all.
    """
    set_numerics(config.threads, pick_device(config.device))
    data, held_out = load_data(config.data, config.size, progress.say).split(config.held_out)
    fit(config, data, folder, signals, progress)
    result = {"zero_shot": zero_shot(folder, templates_of(config.templates, data)[0], held_out)}
    checkpoint.write_json_atomic(folder / "evaluation.json", result)
    return result


def fit(config: TrainClip, data: Dataset, folder: Path, signals: Signals, progress: Progress) -> None:
    """Train on ``data`` into ``folder``, from its newest checkpoint on; leaves ``folder/clip``."""
    run = identity.enter(folder, "train-clip", config, checkpoint.NEWEST)
    run.require_inputs({"data": data.sha256})
    model, described = config.model.described(data.shape)
    clip = towers.build(model, integer(config.seed, "clip", "initial weights")).to(pick_device(config.device))
    learner = Learner(clip, Preprocess.of(described), data, config)
    every = config.checkpoint_every
    fitting.fit(learner, run, config.steps, every, signals, progress, fitting.Shown("CLIP", "clip"))
    with learner.optimization.ema.averaged():
        towers.save(folder / "clip", clip, model, described)


@torch.no_grad()
def zero_shot(folder: Path, template: str, data: Dataset) -> float:
    """The share of ``data`` that the CLIP in ``folder`` gets right, asked with ``template``."""
    clip = towers.load(str(folder))
    images = F.normalize(clip.visual(clip.preprocess(to_pixels(data.x))), dim=-1)
    return ((images @ clip.table(template, data.names).T).argmax(1) == data.label).double().mean().item()


def cached(data: Dataset, root: Path, progress: Progress) -> Path:
    """The folder of the small CLIP of ``data`` under ``root/cache``; trained there, by the defaults, if it is not yet.

    The name holds a hash of the settings and of the data themselves.
    """
    config = TrainClip(device="cpu")
    named = json.dumps([FORMAT, asdict(config), data.names, data.shape])
    digest = hashlib.sha256(named.encode() + data.x.numpy().tobytes() + data.label.numpy().tobytes())
    folder = root / "cache" / f"clip-{digest.hexdigest()[:16]}"
    storage.make_folder(folder)
    signals = in_force()
    with locked(folder, signals), one_thread():
        if not (folder / "clip" / towers.DESCRIPTION).is_file():
            fit(config, data, folder, signals, progress)
    return folder
