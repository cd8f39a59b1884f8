"""ddpo-pytorch (Black et al. 2023): the ml_collections of config/base.py, and what config/dgx.py sets over it."""

from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.jobs.imports import shared
from rlfusion.jobs.imports.table import Given, Made, Program, Row

REWARDS = {
    "jpeg_compressibility": "jpeg_compressibility",
    "jpeg_incompressibility": "jpeg_incompressibility",
    "aesthetic_score": "aesthetic",
}
TRACKING = dict | None
BUFFER, COUNT = "per_prompt_stat_tracking.buffer_size", "per_prompt_stat_tracking.min_count"

ROWS = (
    Row("run_name", "", "name"),
    Row("seed", 42, "seed"),
    Row("logdir", "logs", "root"),
    Row("num_epochs", 100, "updates"),
    Row("save_freq", 20, "checkpoint_every"),
    Row("num_checkpoint_limit", 5, "checkpoints.last"),
    Row("mixed_precision", "fp16", "pipeline.dtype", "of what is frozen; what is trained is float32"),
    Row("allow_tf32", True, "tf32"),
    Row("resume_from", "", "", shared.NO_CHECKPOINT),
    Row("use_lora", True, "lora", f"`{shared.ADAPTERS}`"),
    Row("pretrained.model", "runwayml/stable-diffusion-v1-5", "base"),
    Row("pretrained.revision", "main", "", shared.REVISION),
    Row("sample.num_steps", 50, "chain.steps"),
    Row("sample.eta", 1.0, "chain.kernel", "`DDIM(eta=...)`"),
    Row("sample.guidance_scale", 5.0, "chain.guidance_scale"),
    Row("sample.batch_size", 1, "rollout.item rollout.prompts", "walks of an epoch: batch size x batches"),
    Row("sample.num_batches_per_epoch", 2, "rollout.prompts", "walks of an epoch: batch size x batches"),
    Row(
        "train.batch_size",
        1,
        "agent.micro_batch agent.updates_per_epoch",
        "walks of an optimiser step: this x accumulation",
    ),
    Row("train.use_8bit_adam", False, "agent.optimizer", "`adamw8bit`"),
    Row("train.learning_rate", 3e-4, "agent.lr"),
    Row("train.adam_beta1", 0.9, "agent.optimizer", "`adamw(betas=(..., ...))`"),
    Row("train.adam_beta2", 0.999, "agent.optimizer", "`adamw(betas=(..., ...))`"),
    Row("train.adam_weight_decay", 1e-4, "agent.weight_decay"),
    Row("train.adam_epsilon", 1e-8, "agent.optimizer", "`adamw(eps=...)`"),
    Row("train.gradient_accumulation_steps", 1, "agent.updates_per_epoch", "walks an epoch / walks an optimiser step"),
    Row("train.max_grad_norm", 1.0, "agent.max_grad_norm"),
    Row("train.num_inner_epochs", 1, "agent.epochs"),
    Row("train.cfg", True, "", shared.ALWAYS_GUIDED),
    Row("train.adv_clip_max", 5.0, "agent.advantage_clip"),
    Row("train.clip_range", 1e-4, "agent.clip agent.clip_per_dim", "the log-ratio is a mean over dimensions there"),
    Row("train.timestep_fraction", 1.0, "agent.step_fraction"),
    Row(
        "prompt_fn",
        "imagenet_animals",
        "pipeline.prompts",
        "`from_file`; others are code: write their prompts into a file",
    ),
    Row("prompt_fn_kwargs", {}, "pipeline.prompts", "`path` of `from_file`", dict),
    Row(
        "reward_fn",
        "jpeg_compressibility",
        "reward",
        "the jpeg ones, `aesthetic_score` as `aesthetic`; others are code",
    ),
    Row(BUFFER, 16, "agent.advantage_window agent.advantage", "`prompt`; `batch` where there is no tracking"),
    Row(COUNT, 16, "", "a prompt's own mean and deviation hold from its first rewards on"),
    Row("per_prompt_stat_tracking", {}, "agent.advantage", "null for none: `batch`", TRACKING),
)


def mapped(given: Given) -> tuple[Made, list[str]]:
    """Settings of ddpo-pytorch as ours."""
    made: Made = {"root": given["logdir"], "seed": given["seed"], "updates": given["num_epochs"]}
    made |= {"name": given["run_name"]} if given["run_name"] else {}
    made |= {"checkpoint_every": given["save_freq"], "checkpoints.last": given["num_checkpoint_limit"]}
    made |= {"tf32": given["allow_tf32"]}
    model, said = shared.model(given["pretrained.model"], given["use_lora"], given["mixed_precision"])
    made |= model | shared.chain(given["sample.num_steps"], given["sample.eta"], given["sample.guidance_scale"], "")
    sizes, total = shared.walks(
        given["sample.batch_size"],
        given["sample.num_batches_per_epoch"],
        given["train.batch_size"],
        given["train.gradient_accumulation_steps"],
    )
    made |= sizes | shared.adam(given["train.learning_rate"], given, "train.")
    made |= shared.policy_gradient(
        given["train.clip_range"],
        given["train.adv_clip_max"],
        given["train.timestep_fraction"],
        given["train.num_inner_epochs"],
    )
    tracked = given["per_prompt_stat_tracking"] is not None
    made |= {"agent.advantage": "prompt" if tracked else "batch", "agent.advantage_window": given[BUFFER]}
    for more, told in (_prompts(given), _reward(given)):
        made |= more
        said += told
    if not given["train.cfg"]:
        said.append(f"train.cfg = False: {shared.ALWAYS_GUIDED}")
    return made, [*said, shared.prompts_said(total)]


def _prompts(given: Given) -> tuple[Made, list[str]]:
    options = given["prompt_fn_kwargs"]
    if given["prompt_fn"] == "from_file" and "path" in options:
        rest = [name for name in options if name != "path"]
        said = [f"prompt_fn_kwargs.{name}: all lines of the file are prompts here; cut it to those" for name in rest]
        return {"pipeline.prompts": options["path"]}, said
    return {}, [f"prompt_fn = {given['prompt_fn']!r} is code: write its prompts into a file for pipeline.prompts"]


def _reward(given: Given) -> tuple[Made, list[str]]:
    name: Any = given["reward_fn"]
    if name in REWARDS:
        return {"reward": REWARDS[name]}, []
    if not name:
        raise ConfigError(f"reward_fn = {name!r}: expected a name")
    return {}, [f"reward_fn = {name!r} is code: say reward, by name or as file.py:function (docs/rewards.md)"]


DDPO_PYTORCH = Program("ddpo-pytorch", "ddpo-pytorch", ROWS, mapped)
