"""Prints the result of each command."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlfusion import config
from rlfusion.cli import shown
from rlfusion.cli.ranked import ranked
from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.manner import manner
from rlfusion.config import CheckAgent, CheckModel, CheckReward, Reproduce, Serve
from rlfusion.jobs import compare, doctor, imports, train_clip
from rlfusion.jobs.board import board
from rlfusion.jobs.check_agent import check_agent
from rlfusion.jobs.check_model import check_model
from rlfusion.jobs.check_reward import Finding, check_reward
from rlfusion.jobs.doctor_trial import failing, trial
from rlfusion.jobs.evaluate import Found, evaluate, short_names
from rlfusion.jobs.measure import headlines
from rlfusion.jobs.push import push
from rlfusion.jobs.reproduce import reproduce
from rlfusion.jobs.runs import timed
from rlfusion.jobs.sample import sample
from rlfusion.jobs.serve_reward import serve

REPORTED = "report.html, comparison.md, .csv and .json, plots as PNG, PDF and SVG"


def run_finetune(settings: config.Finetune, folder: Path) -> None:
    """Fine-tune in ``folder``, and print the result."""
    result, seconds = timed(ranked("finetune"), settings, folder)
    if _summed("finetune", folder, seconds, result):
        return
    console, held = _console(), (result["before"], result["after"])
    rows = [[name, *(f"{one[name]:.4g}" for one in held)] for name in headlines(result["after"])]
    title = f"reward {settings.reward_name}: {result['queries']} queries; {seconds:.0f} s in all"
    shown.figures(console, title, ("", "before", "after"), rows)
    also = [name for name in ("best/", "diagnosis.md") if (folder / name).exists()]
    files = ("samples/before.png", "samples/after.png", "model/", *also, "summary.json", "metrics.jsonl", "config.yaml")
    _where(console, folder, ", ".join(files))


def run_compare(settings: config.Compare, folder: Path) -> None:
    """Compare in ``folder``, and print the table."""
    page, seconds = timed(compare.compare, settings, folder)
    if _summed("compare", folder, seconds, compare.ends(folder)):
        return
    console = _console()
    _compared(console, page, folder)
    _where(console, folder, f"{REPORTED}, one folder a run")


def run_compare_runs(settings: config.CompareRuns) -> None:
    """Compare runs that are there, and print the table."""
    page, folder = compare.compare_runs(settings)
    console = Console()
    _compared(console, page, folder)
    console.print(f"in {folder}: {REPORTED}", markup=False, soft_wrap=True)
    console.print(f"see it: rlfusion board {shlex.quote(str(folder.parent))}", markup=False, soft_wrap=True)


def run_pretrain(settings: config.Pretrain, folder: Path) -> None:
    """Pretrain in ``folder``, and print the evaluation."""
    result, seconds = timed(ranked("pretrain"), settings, folder)
    if _summed("pretrain", folder, seconds, result):
        return
    console = _console()
    if result:
        _print(console, result, f"{settings.train.steps} steps, {seconds:.0f} s")
    else:
        console.print(
            "no evaluation: it needs two classes, or captions with two samples each (or evaluation.bits_per_dim)"
        )
    _where(console, folder, "samples/grid.png, model/, metrics.jsonl, config.yaml")


def run_distill(settings: config.Distill, folder: Path) -> None:
    """Distil in ``folder``, and print the evaluation of the student."""
    result, seconds = timed(ranked("distill"), settings, folder)
    if _summed("distill", folder, seconds, result):
        return
    console = _console()
    title = f"{settings.method.name}, {settings.chain.moves} steps: {seconds:.0f} s"
    if result:
        _print(console, result, title)
    else:
        console.print(f"{title}; no evaluation: it needs two classes, or captions with two samples each")
    _where(console, folder, "samples/grid.png, model/, metrics.jsonl, config.yaml")


def run_autoencoder(settings: config.Autoencode, folder: Path) -> None:
    """Train an autoencoder in ``folder``, and print how well it does."""
    result, seconds = timed(ranked("pretrain-autoencoder"), settings, folder)
    if _summed("pretrain-autoencoder", folder, seconds, result):
        return
    console = _console()
    _print(console, result, f"{settings.steps} steps, {seconds:.0f} s")
    _where(console, folder, "samples/reconstructions.png, autoencoder/, metrics.jsonl, config.yaml")


def run_clip(settings: config.TrainClip, folder: Path) -> None:
    """Train a CLIP in ``folder``, and print how well it does."""
    result, seconds = timed(train_clip.run, settings, folder)
    if _summed("train-clip", folder, seconds, result):
        return
    console = _console()
    _print(console, result, f"{settings.steps} steps, {seconds:.0f} s")
    _where(console, folder, "clip/, evaluation.json, metrics.jsonl, config.yaml")


def run_sample(settings: config.Sample) -> None:
    """Draw samples, and say where the picture is."""
    sample(settings)
    Console().print(f"{settings.count} samples in {settings.out}", markup=False)


def run_evaluate(settings: config.Evaluate) -> None:
    """Measure a model, or two, and print the figures."""
    evaluate(settings, lambda found, result: _print_figures(settings, found, result))


def _print_figures(settings: config.Evaluate, found: Found, result: dict[str, Any]) -> None:
    console = Console()
    if len(found) == 1:
        _print(console, {name: value for name, value in result.items() if name != "suite"}, settings.checkpoint)
    else:
        _print_beside(console, found, settings)
    for sampler, rewards in result.get("paired", {}).items():
        first, second = short_names(found).values()
        keys = ("difference", "standard_error", "p", "better")
        rows = [[name, *(_number(held.get(key), 3) for key in keys)] for name, held in rewards.items()]
        head = ("", "difference", "standard error", "p", "better")
        shown.figures(console, f"{first} - {second}, sample by sample ({sampler})", head, rows)
    for column, categories in result.get("suite", {}).get("categories", {}).items():
        title = f"{result['suite']['name']}, by {column}"
        shown.figures(console, title, *_by_category(categories, short_names(found)))
    left_out = {name: why for one in found.values() for name, why in one.left_out.items()}
    for name, why in left_out.items():
        console.print(f"{name} is left out: it takes {why}", markup=False, soft_wrap=True)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _by_category(categories: Mapping[str, Any], short: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table: the rewards of each category, of each model and sampler, and what two models
    differ by.
    """
    head, rows, first = ["", "prompts"], [], next(iter(categories.values()))
    told = [(m, s, r) for m, samplers in first["models"].items() for s, rewards in samplers.items() for r in rewards]
    paired = [(s, r) for s, rewards in first.get("paired", {}).items() for r in rewards]
    several = len({sampler for _, sampler, _ in told}) > 1
    for model, sampler, reward in told:
        words = (reward, short[model] if len(short) > 1 else "", sampler if several else "")
        head.append(" ".join(filter(None, words)))
    for sampler, reward in paired:
        head.append(f"{reward} difference{f' {sampler}' if several else ''} (p)")
    for category, held in categories.items():
        cells = [f"{held['models'][m][s][r]:.4g}" for m, s, r in told]
        cells += [_difference(held["paired"][s][r]) for s, r in paired]
        rows.append([category, str(held["prompts"]), *cells])
    return head, rows


def _difference(held: Mapping[str, float]) -> str:
    return f"{held['difference']:+.3g}" + (f" ({held['p']:.2g})" if "p" in held else "")


def _print_beside(console: Console, found: Found, settings: config.Evaluate) -> None:
    short, several = short_names(found), len(settings.samplers) > 1
    head = ["", *(f"{short[name]}, {sampler}" if several else short[name] for name, sampler in found)]
    names = dict.fromkeys(name for one in found.values() for name in one.values)
    rows = [[name, *(_number(one.values.get(name), 4) for one in found.values())] for name in names]
    count = next(iter(found.values())).values["count"]
    shown.figures(console, f"{count:.0f} samples on the same seeds", head, rows)


def run_import_config(settings: config.ImportConfig) -> None:
    """Write another program's settings as ours, or print them; what has no counterpart goes to stderr."""
    text, found = imports.import_config(settings)
    if settings.out:
        storage.write(Path(settings.out), text)
        Console().print(f"rlfusion finetune --config {settings.out}", markup=False, soft_wrap=True)
    else:
        print(text, end="")
    told = Console(stderr=True, highlight=False)
    for line in (*(f"missing: {line}" for line in found.missing), *found.said):
        told.print(line, markup=False, soft_wrap=True)


def run_push(settings: config.Push) -> None:
    """Write a run's model with its card, and upload it."""
    push(settings, lambda line: Console().print(line, markup=False, soft_wrap=True))


def run_check_reward(settings: CheckReward) -> None:
    """Check a reward, and print what was found, row by row.

    Raises:
        ConfigError: it fails a check.
    """
    _findings(f"reward {settings.reward!r}", check_reward(settings))


def run_check_agent(settings: CheckAgent) -> None:
    """Check an agent, and print what was found, row by row.

    Raises:
        ConfigError: it fails a check.
    """
    _findings(f"agent {settings.agent!r}", check_agent(settings))


def run_check_model(settings: CheckModel) -> None:
    """Check a model, and print what was found, row by row.

    Raises:
        ConfigError: it fails a check.
    """
    _findings(f"model {settings.model!r}", check_model(settings))


def run_reproduce(settings: Reproduce) -> None:
    """Run an item that failed again, and print line by line what is seen."""
    for line in reproduce(settings):
        print(line, flush=True)


def _findings(what: str, findings: Iterable[Finding]) -> None:
    """Print findings as a table; one that failed is an error."""
    rows = list(findings)
    shown.texts(Console(), what, ("check", "", "what was seen"), rows)
    if failed := [check for check, verdict, _ in rows if verdict == "FAILS"]:
        raise ConfigError(f"{what} fails: {', '.join(failed)}")


def run_doctor(settings: config.Finetune | None, unscored: NumericalError | None = None) -> None:
    """Print what is here and, for settings, the memory that they need and what a trial of them finds; where the reward
    has failed already, that alone.

    Raises:
        ConfigError: a row of the trial fails.
    """
    console = Console()
    shown.texts(console, "what is here", ("", ""), list(doctor.environment()))
    if settings is None:
        return
    if unscored is not None:
        _findings("this fine-tuning", [failing(unscored)])
    found = doctor.memory_estimate(settings)
    sizes = [*found.items(), ("together", sum(found.values()))]
    rows = [[name, f"{size / 1e9:.3f}"] for name, size in sizes]
    shown.figures(console, "memory of this fine-tuning, before scratch space and the reward's own", ("", "GB"), rows)
    _findings("this fine-tuning", trial(settings, found))


def run_serve_reward(settings: Serve) -> None:
    """Serve a reward until a signal."""
    serve(settings, lambda message: print(message, flush=True))


def run_board(settings: config.Board) -> None:
    """TensorBoard until a signal."""
    board(settings, lambda message: print(message, flush=True))


def _print(console: Console, result: dict[str, float], title: str) -> None:
    shown.figures(console, title, ("", "value"), [[name, f"{value:.4g}"] for name, value in result.items()])


def _compared(console: Console, page: str, folder: Path) -> None:
    """The page of a comparison, or in a terminal that is too narrow for it the few figures that fit."""
    if not console.is_terminal or max(map(len, page.splitlines())) <= console.width:
        console.print(page, markup=False, highlight=False, soft_wrap=True)
        return
    for held in compare.brief(folder):
        shown.figures(console, held.title, held.head, held.rows)
    console.print(f"all figures: {folder / 'comparison.md'}", markup=False, soft_wrap=True)


def _console() -> Console:
    """Standard output for all but the last line of a command."""
    return Console(quiet=manner().quiet)


def _summed(command: str, folder: Path, seconds: float, result: Mapping[str, Any]) -> bool:
    """With --json the summary of a command, printed as one line; whether it was."""
    if manner().json:
        told = {"command": command, "folder": str(folder), "seconds": round(seconds, 3), **result}
        print(json.dumps(told), flush=True)
    return manner().json


def _where(console: Console, folder: Path, what: str) -> None:
    console.print(f"in {folder}: {what}", markup=False, soft_wrap=True)
    Console().print(f"see it: rlfusion board {shlex.quote(str(folder))}", markup=False, soft_wrap=True)
