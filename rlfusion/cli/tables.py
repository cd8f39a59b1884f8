"""What each command of ``rlfusion.cli`` does with its settings."""

import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlfusion import config, models
from rlfusion.common import storage
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import NOTHING, Signals, StopRequested, blocked, leaving
from rlfusion.config import CheckModel, CheckReward, Serve
from rlfusion.data import load
from rlfusion.diffusion.chain import Chain
from rlfusion.evaluation import require_independent
from rlfusion.jobs import compare, doctor, pretrain_autoencoder, train_clip
from rlfusion.jobs.check_model import check_model
from rlfusion.jobs.check_reward import Finding, check_reward
from rlfusion.jobs.distill import distill
from rlfusion.jobs.finetune import finetune
from rlfusion.jobs.measure import Judged, Unjudged, draw, headlines, measure, require_models_data
from rlfusion.jobs.pretrain import pretrain
from rlfusion.jobs.serve_reward import serve
from rlfusion.models import pipelines
from rlfusion.training import checkpoint
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.folders import discard, locked, make_root, new_folder
from rlfusion.training.tracking import grid, save_png

COLUMNS = 10
PLAIN = pipelines.Settings()


def _timed(job: Callable[..., Any], settings: Any, folder: Path) -> tuple[Any, float]:
    """What a job in ``folder`` returns, and the seconds that it took."""
    begin = time.monotonic()
    with Signals() as signals, locked(folder):
        return job(settings, folder, signals, Progress()), time.monotonic() - begin


def run_finetune(settings: config.Finetune, folder: Path) -> None:
    """Fine-tune in ``folder``, and print the result."""
    result, seconds = _timed(finetune, settings, folder)
    table = Table(title=f"reward {settings.reward_name}: {result['queries']} queries, {seconds:.0f} s")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for name in headlines(result["after"]):
        table.add_row(name, f"{result['before'][name]:.4g}", f"{result['after'][name]:.4g}")
    console = Console()
    console.print(table)
    _where(console, folder, "samples/before.png, samples/after.png, model/, summary.json, metrics.jsonl, config.yaml")


def run_compare(settings: config.Compare, folder: Path) -> None:
    """Compare in ``folder``, and print the table."""
    page, _ = _timed(compare.compare, settings, folder)
    console = Console()
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    _where(console, folder, "comparison.md, comparison.json, one plot a reward, one folder a run", folder)


def run_pretrain(settings: config.Pretrain, folder: Path) -> None:
    """Pretrain in ``folder``, and print the evaluation."""
    result, seconds = _timed(pretrain, settings, folder)
    console = Console()
    if result:
        _print(console, result, f"{settings.train.steps} steps, {seconds:.0f} s")
    else:
        console.print(
            "no evaluation: it needs two classes, or captions with two samples each (or evaluation.bits_per_dim)"
        )
    _where(console, folder, "samples/grid.png, model/, metrics.jsonl, config.yaml")


def run_distill(settings: config.Distill, folder: Path) -> None:
    """Distil in ``folder``, and print the evaluation of the student."""
    result, seconds = _timed(distill, settings, folder)
    console = Console()
    title = f"{settings.method.name}, {settings.chain.moves} steps: {seconds:.0f} s"
    if result:
        _print(console, result, title)
    else:
        console.print(f"{title}; no evaluation: it needs two classes, or captions with two samples each")
    _where(console, folder, "samples/grid.png, model/, metrics.jsonl, config.yaml")


def run_autoencoder(settings: config.Autoencode, folder: Path) -> None:
    """Train an autoencoder in ``folder``, and print how well it does."""
    result, seconds = _timed(pretrain_autoencoder.run, settings, folder)
    console = Console()
    _print(console, result, f"{settings.steps} steps, {seconds:.0f} s")
    _where(console, folder, "samples/reconstructions.png, autoencoder/, metrics.jsonl, config.yaml")


def run_clip(settings: config.TrainClip, folder: Path) -> None:
    """Train a CLIP in ``folder``, and print how well it does."""
    result, seconds = _timed(train_clip.run, settings, folder)
    console = Console()
    _print(console, result, f"{settings.steps} steps, {seconds:.0f} s")
    _where(console, folder, "clip/, evaluation.json, metrics.jsonl, config.yaml")


def run_sample(settings: config.Sample) -> None:
    """Draw samples and write the picture."""
    set_numerics(settings.threads, pick_device(settings.device))
    asked = (settings.count, settings.label)
    denoiser, card, policy, times = _sampler(
        settings.checkpoint, settings.chain, settings.device, settings.pipeline, *asked
    )
    if settings.label and settings.label not in card.names and not card.captioned:
        raise ConfigError(f"label = {settings.label!r}: expected one of {', '.join(card.names)}")
    if settings.label not in ("", *card.names):
        card = replace(card, names=(*card.names, settings.label))
        denoiser.net.label.set(card.names)
        policy = settings.chain.policy(denoiser, card.names)
    device = next(denoiser.parameters()).device
    label = torch.arange(settings.count, device=device) % card.classes
    if settings.label:
        label = torch.full_like(label, card.names.index(settings.label))
    samples = draw(policy, times, label, card.shape, settings.seed, "sample")
    columns = card.classes if 1 < card.classes <= 2 * COLUMNS and not settings.label else COLUMNS
    save_png(Path(settings.out), grid(samples, min(columns, settings.count), settings.scale))
    Console().print(f"{settings.count} samples in {settings.out}", markup=False)


def run_evaluate(settings: config.Evaluate) -> None:
    """Measure a model, print the figures, and write them if asked."""
    set_numerics(settings.threads, pick_device(settings.device))
    most = settings.evaluation.samples
    _, card, policy, times = _sampler(settings.checkpoint, settings.chain, settings.device, settings.pipeline, most)
    device, root = pick_device(settings.device), Path(settings.root)
    judged = Unjudged(card.shape, card.names, card.metadata) if card.pipeline else _judged(settings, card, device)
    reward = None
    if settings.reward:
        reward = judged.reward(settings.reward, settings.reward_options, root)
        if judged.judge is not None:
            require_independent(judged.judge, reward)
        if isinstance(reward, torch.nn.Module):
            reward.to(device)
    result = measure(policy, times, judged, reward, str(settings.reward), settings.evaluation, settings.seed)
    _print(Console(), result, settings.checkpoint)
    if settings.out:
        checkpoint.write_json_atomic(Path(settings.out), result)


def _judged(settings: config.Evaluate, card: models.Card, device: torch.device) -> Judged:
    """The data of an evaluation and their judge.

    Raises:
        ConfigError: data that are not the model's.
    """
    data = load(settings.data, settings.size, Progress().say)
    require_models_data(settings.data, data, card)
    return Judged.of(data, settings.held_out, Path(settings.root), device)


def run_check_reward(settings: CheckReward) -> None:
    """Check a reward, and print what was found, row by row.

    Raises:
        ConfigError: it fails a check.
    """
    _findings(f"reward {settings.reward!r}", check_reward(settings))


def run_check_model(settings: CheckModel) -> None:
    """Check a model, and print what was found, row by row.

    Raises:
        ConfigError: it fails a check.
    """
    _findings(f"model {settings.model!r}", check_model(settings))


def _findings(what: str, findings: Iterable[Finding]) -> None:
    """Print findings as a table; one that failed is an error."""
    table = Table(title=what)
    for name in ("check", "", "what was seen"):
        table.add_column(name, overflow="fold")
    failed = []
    for check, verdict, said in findings:
        table.add_row(check, verdict, escape(said))
        failed += [check] if verdict == "FAILS" else []
    Console().print(table)
    if failed:
        raise ConfigError(f"{what} fails: {', '.join(failed)}")


def run_doctor(settings: config.Finetune | None) -> None:
    """Print what is here and, for settings, the memory that they need."""
    table = Table(title="what is here", show_header=False)
    for row in doctor.environment():
        table.add_row(*map(escape, row))
    console = Console()
    console.print(table)
    if settings is None:
        return
    found = doctor.needs(settings)
    table = Table(title="memory of this fine-tuning, before scratch space and the reward's own")
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, size in [*found.items(), ("together", sum(found.values()))]:
        table.add_row(name, f"{size / 1e9:.3f}")
    console.print(table)


def run_serve_reward(settings: Serve) -> None:
    """Serve a reward until a signal."""
    serve(settings, lambda said: print(said, flush=True))


@contextmanager
def new_run(command: str, settings: Any, name: str) -> Iterator[tuple[Any, Path]]:
    """A new folder for a run, holding its complete settings as ``config.yaml``; the settings with the folder's name.

    Within the context the run is ``at_work`` there.

    Raises:
        ConfigError: a name that is none of a folder.
        StorageError: the folder cannot be made or written to.
    """
    if settings.name and Path(settings.name).name != settings.name:
        raise ConfigError(f"name = {settings.name!r}: expected the name of a folder, without a path")
    storage.require_local("root", settings.root)
    settings = _recorded(settings)
    with ExitStack() as stack:
        make_root(Path(settings.root))
        with blocked():  # until it is known that it is to be removed
            folder = new_folder(Path(settings.root), settings.name or name)
            stack.enter_context(at_work(command, folder, new=True))
        settings = replace(settings, name=folder.name)
        storage.write(folder / "config.yaml", config.to_yaml(settings))
        yield settings, folder


@contextmanager
def at_work(command: str, folder: Path, new: bool) -> Iterator[None]:
    """Within the context a run works in ``folder``. If it ends early, a ``new`` folder that holds nothing is removed,
    and a stop says how to go on.
    """

    def left(saved: bool) -> str:
        if new and not saved and discard(folder):
            return NOTHING
        return f"go on with: rlfusion {command} --resume {shlex.quote(str(folder))}"

    with leaving(left):
        try:
            yield
        except StopRequested as stop:
            stop.left = left(stop.saved)
            raise
        except BaseException:
            if new:
                discard(folder)
            raise


def _recorded(settings: Any) -> Any:
    """The settings with the prompts of a pipeline, if any, as a run writes them down: with their digest."""
    if not isinstance(settings, config.Finetune | config.Compare):
        return settings
    return replace(settings, pipeline=settings.pipeline.recorded())


def _sampler(
    path: str, chain: Chain, device: str, pipeline: pipelines.Settings = PLAIN, most: int = 0, label: str = ""
) -> tuple[Any, ...]:
    """A model with its chain; of a pipeline with the first ``most`` of its prompts, or with the one that is ``label``,
    as no others are asked for.
    """
    card = models.describe(path, pipeline, chain.negative)
    card = card.only(label) if label in card.names else card.first(most or card.classes)
    if card.pipeline:
        denoiser = models.build(card, device=pick_device(device))
    else:
        denoiser, card = models.load(Path(path))
    denoiser = denoiser.to(pick_device(device))
    return denoiser, card, chain.policy(denoiser, card.names), chain.times(denoiser)


def _print(console: Console, result: dict[str, float], title: str) -> None:
    table = Table(title=title)
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def _where(console: Console, folder: Path, what: str, logdir: Path | None = None) -> None:
    console.print(f"in {folder}: {what}", markup=False, soft_wrap=True)
    console.print(f"see it: tensorboard --logdir {logdir or folder.parent}", markup=False, soft_wrap=True)
