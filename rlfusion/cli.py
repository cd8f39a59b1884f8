"""The command line: ``rlfusion finetune | compare | pretrain | distill | sample | evaluate | ...``.

Exit codes: 0 done, 2 bad configuration (one line says the key, the value, what was expected, the nearest valid name),
4 numerical failure, 75 stopped by a signal after saving (resume with --resume).
"""

import difflib
import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlfusion.errors import ConfigError, NumericalError, unknown

DONE, BAD_CONFIG, NUMERICAL, STOPPED, INTERRUPTED = 0, 2, 4, 75, 130

GUIDE = """\
Fine-tune diffusion models by reward: the denoising chain is a Gymnasium MDP, the model is its policy.

  rlfusion finetune                          the main job: pretrain on digits (once), improve by DDPO
  rlfusion finetune --agent NAME             another algorithm: ddpo, ... (--agent NAME --help: its settings)
  rlfusion finetune --reward ink             another reward; also your own, --reward package.module:name
  rlfusion finetune --rollout.workers 2      the same result, collected by 2 Ray workers
  rlfusion finetune --resume runs/NAME       go on where a stopped or killed run was
  rlfusion finetune --config runs/NAME/config.yaml --seed 1
                                             the same settings again, with changes
  rlfusion pretrain                          a model alone; --data FOLDER or FILE.npz for your own images
  rlfusion pretrain --objective flow         another recipe: eps, v, flow, trigflow, edm, ... (docs/pretraining.md)
  rlfusion compare --agents ddpo,grpo --rewards ink,symmetry --seeds 3 --budget_queries 2400
                                             algorithms side by side: table, plots, one TensorBoard
  rlfusion distill --method cd --teacher runs/NAME
                                             a student of a few steps: cd, ... (docs/distillation.md)
  rlfusion finetune --base runs/STUDENT      any model to start from, also a student, with its own chain
  rlfusion pretrain-autoencoder              an autoencoder; pretrain --autoencoder runs/NAME works in its latents
  rlfusion train-clip                        a small CLIP of images and words, for the CLIP rewards (docs/rewards.md)
  rlfusion sample --checkpoint runs/NAME     a picture of its samples
  rlfusion evaluate --checkpoint runs/NAME   its quality in figures
  rlfusion check-reward NAME                 is a reward fit to be trained on? (docs/rewards.md)
  rlfusion finetune --model HUB-ID --pipeline.prompts FILE.txt
                                             a pretrained text-to-image pipeline (docs/models.md)
  rlfusion check-model HUB-ID                is a model fit to be trained by reward?
  rlfusion doctor [settings of finetune]     what is here, and the memory that such a run takes
  rlfusion serve-reward NAME --port 8500     a reward for other processes: --reward http://127.0.0.1:8500
  tensorboard --logdir runs                  all runs, with before/after grids

Every command takes --help (all settings with their meaning), --config FILE.yaml and --print_config.
"""

PRESET_PREFIX = {"pretrain": "", "finetune": "pretrain.", "compare": "pretrain.", "distill": "pretrain."}
"""The commands that take --objective, and where they keep the settings of pretraining."""

PIPELINE_DEFAULTS = {
    "finetune": {"evaluation.samples": 64, "monitor.samples": 64, "rollout.item": 8},
    "compare": {"evaluation.samples": 64, "rollout.item": 8},
    "sample": {"count": 8, "scale": 1},
    "evaluate": {"evaluation.samples": 64},
    "check-model": {},
}
"""Defaults of the commands where the model is a pretrained pipeline."""

OBJECTIVE = "a pretraining recipe by name (docs/pretraining.md): sets model, train.loss and chain"

RESUMABLE = ("finetune", "compare", "pretrain", "pretrain-autoencoder", "distill", "train-clip")
RESUMING = "--resume FOLDER, and nothing else, goes on with a stopped or killed run."


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    sys.path.append(os.getcwd())  # a user's package.module:name may lie there; last, so that it hides no library
    try:
        return _run(arguments)
    except (ConfigError, ArgumentError) as error:
        print(f"rlfusion: {_one_line(error)}", file=sys.stderr)
        return BAD_CONFIG
    except NumericalError as error:
        print("\n".join([f"rlfusion: {error.kind}: {error}", *_notes(error)]), file=sys.stderr)
        return NUMERICAL
    except KeyboardInterrupt:
        print("rlfusion: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(GUIDE)
        return DONE
    if arguments[0] == "--version":
        from rlfusion import __version__

        print(__version__)
        return DONE
    if arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    from rlfusion.run import StopRequested

    try:
        COMMANDS[arguments[0]](arguments[1:])
    except StopRequested as stop:
        print(f"rlfusion: stopped by {stop}; all work is saved, go on with --resume", file=sys.stderr)
        return STOPPED
    return DONE


def _job(kind: str, arguments: list[str]) -> None:
    """finetune, pretrain, compare or distill: a new run, or an old one to resume."""
    from rlfusion import autoencoding, commands, comparison, contrastive
    from rlfusion.distilling import check as check_distill
    from rlfusion.finetune import check as check_finetune
    from rlfusion.pretraining import check as check_pretrain

    run = {
        "finetune": commands.run_finetune,
        "compare": commands.run_compare,
        "pretrain": commands.run_pretrain,
        "distill": commands.run_distill,
        "pretrain-autoencoder": commands.run_autoencoder,
        "train-clip": commands.run_clip,
    }[kind]
    if any(argument.partition("=")[0] == "--resume" for argument in arguments):
        run(*_resumed(kind, arguments))
        return
    settings = settings_of(kind, arguments)
    check = {
        "finetune": check_finetune,
        "compare": comparison.check,
        "pretrain": check_pretrain,
        "distill": check_distill,
        "pretrain-autoencoder": autoencoding.check,
        "train-clip": contrastive.check,
    }[kind]
    check(settings)
    run(*commands.new_run(settings, settings.default_name))


def settings_of(kind: str, arguments: list[str]) -> Any:
    """The settings of a job; those of an agent or a method are of the algorithm that ``--agent`` or ``--method`` names.
    The chain of a fine-tuning or a comparison is that of the model of ``--base``, unless told otherwise.
    """
    from rlfusion import config

    if kind == "pretrain":
        return parse(config.Pretrain, kind, arguments)
    if kind == "pretrain-autoencoder":
        from rlfusion.autoencoding import Autoencode

        return parse(Autoencode, kind, arguments)
    if kind == "train-clip":
        from rlfusion.contrastive import TrainClip

        return parse(TrainClip, kind, arguments)
    if kind == "compare":
        from rlfusion.comparison import Compare

        return parse(Compare, kind, _listed(arguments), _defaults("compare", arguments, "base"))
    if kind == "distill":
        arguments = _long(arguments, "method")
        typed = config.with_method(str(_told(arguments, "method", "name") or "cd"))
        return parse(typed, kind, arguments, make=config.Distill)
    arguments = [re.sub(r"^--model(=|$)", r"--base\1", argument) for argument in _long(arguments, "agent")]
    typed = config.with_agent(str(_told(arguments, "agent", "name") or "ddpo"))
    return parse(typed, kind, arguments, _defaults("finetune", arguments, "base"), make=config.Finetune)


def _long(arguments: list[str], what: str) -> list[str]:
    """``--agent NAME`` as ``--agent.name NAME``; a mapping or a file of settings after ``--agent`` stays."""
    option = f"--{what}"
    values = [a.partition("=")[2] if "=" in a else following for a, following in pairwise([*arguments, ""])]
    named = [re.fullmatch(rf"{option}(=.*)?", a) and re.fullmatch(r"\w+", value) for a, value in zip(arguments, values)]
    return [a.replace(option, f"{option}.name", 1) if short else a for a, short in zip(arguments, named)]


def _listed(arguments: list[str]) -> list[str]:
    """``--agents a,b(c=1,d=2)`` and ``--rewards`` as the YAML lists that they stand for."""
    out, last = [], ""
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else (last, "", argument)
        if option in ("--agents", "--rewards") and value and not value.startswith("["):
            parts = [part.strip() for part in re.split(r",(?![^(]*\))", value)]
            value = json.dumps(parts)
            argument = f"{option}={value}" if equals else value
        last = argument if argument.startswith("--") and not equals else ""
        out.append(argument)
    return out


def _told(arguments: list[str], *key: str) -> Any:
    """The value that the arguments, or the configuration files among them, give a setting last; None for none."""
    import yaml

    words = [word for argument in arguments for word in argument.split("=", 1)]
    told = None
    for option, value in pairwise(words):
        if option == f"--{'.'.join(key)}":
            told = value
        elif option == "--config" and Path(value).is_file():
            held = yaml.safe_load(Path(value).read_text())
            for name in key:
                held = held.get(name) if isinstance(held, dict) else None
            told = told if held is None else held
    return told


def _resumed(kind: str, arguments: list[str]) -> tuple[Any, Path]:
    words = [*arguments[0].split("=", 1), *arguments[1:]]
    if len(words) != 2 or words[0] != "--resume":
        raise ConfigError("--resume takes the run's folder and nothing else: its settings are those of its config.yaml")
    folder = Path(words[1])
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--resume {str(folder)!r}: expected the folder of a run, with config.yaml")
    settings = settings_of(kind, ["--config", str(folder / "config.yaml")])
    return replace(settings, root=str(folder.parent)), folder


def _sample(arguments: list[str]) -> None:
    from rlfusion import commands, config

    commands.run_sample(parse(config.Sample, "sample", arguments, _defaults("sample", arguments, "checkpoint")))


def _evaluate(arguments: list[str]) -> None:
    from rlfusion import commands, config

    commands.run_evaluate(parse(config.Evaluate, "evaluate", arguments, _defaults("evaluate", arguments, "checkpoint")))


def _check_reward(arguments: list[str]) -> None:
    from rlfusion import commands
    from rlfusion.reward_check import CheckReward

    commands.run_check_reward(parse(CheckReward, "check-reward", _reward_first(arguments)))


def _doctor(arguments: list[str]) -> None:
    from rlfusion import commands, finetune

    settings = settings_of("finetune", arguments) if arguments else None
    if settings is not None:
        finetune.check(settings)
    commands.run_doctor(settings)


def _check_model(arguments: list[str]) -> None:
    from rlfusion import commands
    from rlfusion.model_check import CheckModel

    arguments = ["--model", *arguments] if arguments and not arguments[0].startswith("-") else arguments
    commands.run_check_model(parse(CheckModel, "check-model", arguments, _defaults("check-model", arguments, "model")))


def _serve_reward(arguments: list[str]) -> None:
    from rlfusion import commands
    from rlfusion.serving import Serve

    commands.run_serve_reward(parse(Serve, "serve-reward", _reward_first(arguments)))


def _reward_first(arguments: list[str]) -> list[str]:
    """``NAME ...`` as ``--reward NAME ...``."""
    return ["--reward", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def _defaults(command: str, arguments: list[str], option: str) -> dict[str, Any]:
    """The chain that the model of an option was made with, as defaults, and of a pretrained pipeline numbers that suit
    its size; none for no model.
    """
    from rlfusion import models, pipelines

    name = _told(arguments, option)
    if not name:
        return {}
    if pipelines.is_pipeline(name):
        variant = str(_told(arguments, "pipeline", "variant") or "")
        training = command in ("finetune", "compare", "check-model")
        chain, few = pipelines.defaults(name, training, variant), PIPELINE_DEFAULTS[command]
    else:
        card = models.load_card(Path(name))
        chain, few = card.chain, PIPELINE_DEFAULTS[command] if card.pipeline else {}
    return few | {f"chain.{key}": value for key, value in chain.items()}


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "finetune": partial(_job, "finetune"),
    "compare": partial(_job, "compare"),
    "pretrain": partial(_job, "pretrain"),
    "distill": partial(_job, "distill"),
    "pretrain-autoencoder": partial(_job, "pretrain-autoencoder"),
    "train-clip": partial(_job, "train-clip"),
    "sample": _sample,
    "evaluate": _evaluate,
    "check-model": _check_model,
    "doctor": _doctor,
    "check-reward": _check_reward,
    "serve-reward": _serve_reward,
}


def parse(
    settings: type,
    command: str,
    arguments: list[str],
    defaults: Mapping[str, Any] | None = None,
    make: type | None = None,
) -> Any:
    """The settings dataclass of a command from its arguments and ``--config`` files; ``defaults`` by dotted key.
    ``make`` is the class of the result where it is not ``settings``.

    Raises:
        ConfigError: an unknown key or an unusable value, in one line.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

    parser = ArgumentParser(
        prog=f"rlfusion {command}",
        description=settings.__doc__.splitlines()[0],
        epilog=RESUMING if command in RESUMABLE else None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="a YAML file of settings, such as a run's config.yaml"
    )
    parser.add_class_arguments(settings, as_group=False)
    parser.set_defaults(dict(defaults or {}))
    if command in PRESET_PREFIX:
        parser.add_argument("--objective", default="", help=OBJECTIVE)
    keys = [action.dest for action in parser._actions]
    try:
        given = parser.parse_args(arguments)
        if given.get("objective"):
            preset = _preset(given.objective, PRESET_PREFIX[command])
            own = "chain." if command == "distill" else "-"  # a student's chain is not its teacher's
            parser.set_defaults({key: value for key, value in preset.items() if not key.startswith(own)})
            given = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), keys)) from error
    for group in sorted({key.rpartition(".")[0] for key in keys} - {""}):
        if not isinstance(given[group], Namespace):
            raise ConfigError(f"{group} = {given[group]!r}: expected a mapping of settings")
    try:
        values = vars(parser.instantiate(given))
        values.pop("config")
        values.pop("objective", None)
        return (make or settings)(**values)
    except ConfigError as error:
        raise ConfigError(_located(str(error), given.items())) from error


def _preset(objective: str, prefix: str) -> dict[str, Any]:
    """The settings of a pretraining preset, as defaults by dotted key: a preset is shorthand, not a setting."""
    from rlfusion.pretrain import PRESETS

    if objective not in PRESETS:
        raise unknown("objective", objective, PRESETS)
    return {key if key.startswith("chain.") else prefix + key: value for key, value in PRESETS[objective].items()}


def _located(text: str, given: Iterable[tuple[str, Any]]) -> str:
    """A dataclass's own "name = value: ..." with the whole dotted key, where one setting alone fits."""
    said = re.match(r"(\w+) = (.*?): ", text)
    fits = [key for key, value in given if said and [key.rpartition(".")[2], str(value)] == list(said.groups())]
    return fits[0].removesuffix(said[1]) + text if said and len(fits) == 1 else text


TYPE_NAMES = re.compile(r"typing\.|<class '|'>")


def _explain(text: str, keys: list[str]) -> str:
    """jsonargparse's message with the nearest key, where a key is unknown."""
    wrong = re.match(r'Parser key "([\w.]+)":\s*Expected an? (.*)\. Got value: (.*)', text, re.DOTALL)
    if wrong:
        key, expected, value = wrong.groups()
        return f"{key} = {value}: expected {TYPE_NAMES.sub('', expected)}"
    inside = re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    found = re.search(r"[Uu]nrecognized arguments: *-*([\w.]+)|(?:Key|Option) ['\"]?([\w.]+)['\"]? is not", text)
    if not found and not inside:
        return text
    key = ".".join(inside.groups()) if inside else found.group(1) or found.group(2)
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    return f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
