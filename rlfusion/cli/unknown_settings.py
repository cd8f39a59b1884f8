"""A setting that does not exist: whose it is, or what was likely meant."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from rlfusion.cli import foreign
from rlfusion.cli.settings_tree import Tree, command_trees
from rlfusion.common.errors import ConfigError, near, shorten

SYNONYMS = {
    "lr": "learning_rate learningrate lrate step_size",
    "batch": "batch_size train_batch_size minibatch_size mini_batch_size bs",
    "micro_batch": "batch_size train_batch_size minibatch_size mini_batch_size per_device_train_batch_size microbatch",
    "updates": "epochs num_epochs steps num_steps iterations num_iterations iters max_iters max_steps total_steps "
    "train_steps num_train_steps num_train_epochs",
    "steps": "updates epochs num_epochs num_steps iterations num_iterations iters max_iters max_steps total_steps "
    "train_steps num_train_steps num_inference_steps inference_steps sampling_steps denoising_steps ddim_steps nfe",
    "chain.steps": "num_inference_steps inference_steps sampling_steps denoising_steps ddim_steps timesteps nfe",
    "lora": "rank r lora_rank lora_r lora_alpha lora_target_modules target_modules use_lora adapter",
    "guidance_scale": "cfg cfg_scale cfg_weight guidance_weight w",
    "guidance": "cfg cfg_scale cfg_weight guidance_weight w guidance_scale",
    "negative": "negative_prompt",
    "base": "model model_name model_id pretrained pretrained_model pretrained_model_name_or_path ckpt checkpoint",
    "checkpoint": "model base ckpt run path folder",
    "teacher": "model base checkpoint ckpt",
    "model": "base checkpoint ckpt pretrained",
    "prompts": "prompt prompt_file prompts_file captions",
    "size": "resolution image_size img_size width height",
    "samples_per_prompt": "num_samples n_samples group_size num_generations k samples",
    "count": "num_samples n_samples n samples num_images",
    "samples": "num_samples n_samples count n",
    "workers": "num_workers n_workers gpus num_gpus",
    "device": "gpu cuda cpu",
    "agent": "algo algorithm method learner trainer",
    "method": "algo algorithm agent",
    "reward": "reward_fn reward_func reward_function reward_model rewards score scorer",
    "rewards": "reward reward_fn",
    "agents": "agent algorithms algos",
    "root": "output output_dir out_dir save_dir logdir log_dir runs",
    "out": "output output_dir out_file output_file save save_path file",
    "name": "run_name run experiment exp_name",
    "seed": "random_seed manual_seed rng",
    "seeds": "seed num_seeds n_seeds",
    "kl_loss": "kl kl_coef kl_coeff kl_beta kl_weight beta",
    "clip": "clip_range cliprange clip_eps epsilon eps_clip ppo_clip",
    "ema_decay": "ema",
    "max_grad_norm": "grad_clip max_norm clip_grad_norm gradient_clipping",
    "weight_decay": "wd decay",
    "precision": "mixed_precision dtype fp16 bf16 amp",
    "dtype": "torch_dtype weight_dtype",
    "checkpointing": "gradient_checkpointing grad_checkpointing",
    "compile": "torch_compile compile_model use_compile",
    "quantize": "load_in_4bit load_in_8bit quantization quantization_config quantize_base bnb_4bit_quant_type qlora",
    "attention": "attention_backend attn_implementation attn_backend",
    "optimizer": "optim opt",
    "kernel": "sampler scheduler",
    "schedule": "noise_schedule beta_schedule scheduler",
    "kind": "prediction_type parameterization prediction",
    "net": "network architecture arch backbone unet",
    "data": "dataset dataset_name data_dir train_data dataset_path",
    "checkpoint_every": "save_every save_steps checkpointing_steps save_freq",
    "evaluation.every": "eval_every eval_steps eval_freq",
    "budget_queries": "budget max_queries query_budget",
    "resume": "resume_from resume_from_checkpoint load continue",
    "warmup": "warmup_steps lr_warmup_steps",
    "threads": "num_threads n_threads cpus num_cpus",
    "objective": "loss preset recipe",
}
"""Words for a setting, by the end of the name that it has here; ``foreign`` has those of other programs."""
FIRST = ("agent.", "method.", "train.", "rollout.", "chain.", "evaluation.")
"""Where a leaf of several places is most likely meant; what pretrains a base model comes last."""


def unknown_setting(typed: str, command: str, known: Tree, chosen: str = "") -> ConfigError:
    """The error about a setting that the command does not have: whose it is, or what was likely meant.

    ``chosen`` is the agent or the method of the command.
    """
    key = _plain(typed)
    message = f"unknown setting {shorten(repr(typed))}"
    guesses = () if foreign.known(key) else (_close, _leaves, _commands, _part, _synonym, _off, _near)
    for find in (_same, _owned, _foreign, *(guesses or (_commands,))):
        if hint := find(key, typed, command, known, chosen):
            return ConfigError(f"{message}{hint}")
    return ConfigError(f"{message}: rlfusion {command} --help lists all settings")


def _plain(name: str) -> str:
    return name.strip().strip("-").lower().replace("-", "_").rstrip("+:")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _choose(key: str, found: Iterable[str], typed: str) -> str:
    """The hint that names the best one or two of ``found``."""
    group = key.rpartition(".")[0]

    def rank(name: str) -> tuple[bool, bool, int, int]:
        within = name.rpartition(".")[0]
        first = next((n for n, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))
        return (
            bool(group) and within != group,
            name.startswith("pretrain."),
            0 if "." not in name else 1 + first,
            len(name),
        )

    names = sorted({name for name in found if name != typed}, key=rank)
    if not names:
        return ""
    alone = group and rank(names[0])[0] is False
    return f"; did you mean {' or '.join(repr(name) for name in names[: 1 if alone else 2])}?"


def _same(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """The same name but for case and dashes."""
    found = [name for name in known.names() if name.lower() == key and name != typed]
    return f"; did you mean {found[0]!r}?" if found else ""


def _owned(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """Whose setting it is: another agent's, another method's."""
    owners = _owners(key, known) if "." in key or not _leaves(key, typed, command, known, chosen) else None
    if not owners:
        return ""
    what, names = owners
    return f": it belongs to {_and(names)}, not to {chosen}; expected --{what} {names[0]}, or another setting"


def _foreign(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """What other programs call so."""
    return foreign.hint(key, list(known.leaves))


def _close(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """A slip of the hand: within the group where there is such a group, else in the whole name."""
    found = _nearest(key, typed, known, 0.8)
    return f"; did you mean {found[0]!r}?" if found else ""


def _leaves(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """The same leaf in another group, and what else the word may mean."""
    found = [name for name in known.names() if _leaf(name).lower() == _leaf(key)]
    return _choose(key, found + ([] if "." in key else _meant(key, known)), typed) if found else ""


def _commands(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """Which other commands have it."""
    commands = [name for name, one in command_trees().items() if name != command and key in one.names()]
    return f": it belongs to {_and(commands)}, not to {command}" if commands else ""


def _owners(key: str, known: Tree) -> tuple[str, list[str]] | None:
    """("agent" or "method", the names of those that have the setting ``key``, with or without that group)."""
    for what, table in _choices().items():
        within, _, leaf = key.rpartition(".")
        if what not in known.groups or within not in ("", what):
            continue
        if names := [name for name, settings in table.items() if leaf in {f.name for f in fields(settings)}]:
            return what, names
    return None


def _synonym(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    found, group = _meant(key, known), key.rpartition(".")[0]
    within = [name for name in found if group and name.startswith(f"{group}.")]
    return _choose(key, within or found, typed)


def _meant(key: str, known: Tree) -> list[str]:
    """The settings that others call by the leaf of ``key``."""
    ends = [name for name, words in SYNONYMS.items() if _leaf(key) in words.split()]
    return [name for name in known.names() for end in ends if f".{name}".endswith(f".{end}")]


def _off(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """``--no-stop``: a setting that is true or false takes the word."""
    if not _leaf(key).startswith("no_"):
        return ""
    found = [n for n, kind in known.leaves.items() if kind is bool and _leaf(n) == _leaf(key).removeprefix("no_")]
    return f"; did you mean --{found[0]} false?" if found else ""


def _part(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """A setting of what another setting writes as text: chain.kernel = DDIM(eta=...)."""
    for end, names in _written().items():
        holders = [name for name in known.leaves if f".{name}".endswith(f".{end}")]
        owners = [name for name, settings in names.items() if _leaf(key) in settings]
        if holders and owners:
            holder = min(holders, key=lambda name: (name.startswith("pretrain."), len(name)))
            return f": it is part of {holder}, as in --{holder} '{owners[0]}({_leaf(key)}=...)'"
    return ""


def _near(key: str, typed: str, command: str, known: Tree, chosen: str) -> str:
    """The nearest of all, at last the nearest leaf."""
    found = _nearest(key, typed, known, 0.65)
    if not found and (leaf := near(_leaf(key), map(_leaf, known.names()), 1, 0.7)):
        return _choose(key, [name for name in known.names() if _leaf(name) == leaf[0]], typed)
    return f"; did you mean {found[0]!r}?" if found else ""


def _nearest(key: str, typed: str, known: Tree, cutoff: float) -> list[str]:
    """The nearest of a group, where there is such a group; else the nearest whole name."""
    group = key.rpartition(".")[0]
    names = [name for name in known.names() if name != typed]
    inside = {_leaf(name): name for name in names if group and name.rpartition(".")[0] == group}
    return [inside[leaf] for leaf in near(_leaf(key), inside, 1, cutoff)] if inside else near(key, names, 1, cutoff)


def _and(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


@cache
def _choices() -> dict[str, dict[str, type]]:
    """The agents and the methods, by name."""
    from rlfusion.agents import AGENTS
    from rlfusion.distill import METHODS

    return {"agent": dict(AGENTS), "method": dict(METHODS)}


@cache
def _written() -> dict[str, dict[str, set[str]]]:
    """The settings of what is written as text, by the end of the setting that holds it."""
    from rlfusion.common import spec
    from rlfusion.diffusion.chain import KERNELS
    from rlfusion.models import NETS, SCHEDULES
    from rlfusion.models.lora import LoRA
    from rlfusion.pretrain.losses import LOSSES

    tables: dict[str, Mapping[str, Any]] = {
        "chain.kernel": KERNELS,
        "lora": {"LoRA": LoRA},
        "model.schedule": SCHEDULES,
        "model.net": NETS,
        "train.loss": LOSSES,
    }
    return {
        end: {name: set(spec.signature_of(made).parameters) for name, made in table.items()}
        for end, table in tables.items()
    }
