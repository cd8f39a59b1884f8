"""TRL's DDPOConfig and AlignPropConfig (0.7 to 0.23), and the arguments of its example scripts beside them."""

from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.jobs.imports import shared
from rlfusion.jobs.imports.table import Given, Made, Program, Row

TEXT = str | None
CODE = (
    "reward: TRL's reward function is code: a reward by name, or file.py:function (docs/rewards.md)",
    "pipeline.prompts: TRL's prompt function is code: a file with a prompt a line",
)

COMMON = (
    Row("exp_name", "", "name", "where `run_name` is empty"),
    Row("run_name", "", "name"),
    Row("seed", 0, "seed"),
    Row("log_with", None, "track", f"`wandb`; {shared.TRACKED}", TEXT),
    Row("tracker_kwargs", {}, "", "settings of a tracker stand in its brackets: `track: [wandb(entity='me')]`", dict),
    Row("tracker_project_name", "trl", "track", "`wandb(project=...)`, where `log_with` is wandb"),
    Row(
        "accelerator_kwargs",
        {},
        "",
        "there is no accelerate; processes are `learner.ranks` and `rollout.workers`",
        dict,
    ),
    Row("project_kwargs", {}, "", "of accelerate; where runs lie is `root`, what stays `checkpoints`", dict),
    Row("logdir", "logs", "root"),
    Row("num_epochs", 100, "updates"),
    Row("save_freq", 1, "checkpoint_every"),
    Row("num_checkpoint_limit", 5, "checkpoints.last"),
    Row("mixed_precision", "fp16", "pipeline.dtype", "of what is frozen; what is trained is float32", TEXT),
    Row("allow_tf32", True, "tf32"),
    Row("resume_from", "", "", shared.NO_CHECKPOINT, TEXT),
    Row("sample_num_steps", 50, "chain.steps"),
    Row("sample_eta", 1.0, "chain.kernel", "`DDIM(eta=...)`"),
    Row("sample_guidance_scale", 5.0, "chain.guidance_scale"),
)
TRAINED = (
    Row("train_use_8bit_adam", False, "agent.optimizer", "`adamw8bit`"),
    Row("train_learning_rate", 3e-4, "agent.lr"),
    Row("train_adam_beta1", 0.9, "agent.optimizer", "`adamw(betas=(..., ...))`"),
    Row("train_adam_beta2", 0.999, "agent.optimizer", "`adamw(betas=(..., ...))`"),
    Row("train_adam_weight_decay", 1e-4, "agent.weight_decay"),
    Row("train_adam_epsilon", 1e-8, "agent.optimizer", "`adamw(eps=...)`"),
    Row("train_max_grad_norm", 1.0, "agent.max_grad_norm"),
)
SCRIPT = (
    Row("pretrained_model", "runwayml/stable-diffusion-v1-5", "base", "an argument of the example script"),
    Row("pretrained_revision", "main", "", shared.REVISION),
    Row("hf_hub_model_id", "", "", "nothing is uploaded by a training: `rlfusion push RUN --to REPO` afterwards"),
    Row(
        "hf_hub_aesthetic_model_id", "trl-lib/ddpo-aesthetic-predictor", "", "`reward: aesthetic` names its own weights"
    ),
    Row("hf_hub_aesthetic_model_filename", "aesthetic-model.pth", "", "`reward: aesthetic` names its own weights"),
    Row("use_lora", True, "lora", f"`{shared.ADAPTERS}`"),
    Row("push_to_hub", False, "", "nothing is uploaded by a training: `rlfusion push RUN --to REPO` afterwards"),
)

DDPO = (
    *COMMON,
    Row("sample_batch_size", 1, "rollout.item rollout.prompts", "walks of an epoch: batch size x batches"),
    Row("sample_num_batches_per_epoch", 2, "rollout.prompts", "walks of an epoch: batch size x batches"),
    Row(
        "train_batch_size",
        1,
        "agent.micro_batch agent.updates_per_epoch",
        "walks of an optimiser step: this x the next",
    ),
    Row("train_gradient_accumulation_steps", 1, "agent.updates_per_epoch", "walks an epoch / walks an optimiser step"),
    *TRAINED,
    Row("train_num_inner_epochs", 1, "agent.epochs"),
    Row("train_cfg", True, "", shared.ALWAYS_GUIDED),
    Row("train_adv_clip_max", 5.0, "agent.advantage_clip"),
    Row("train_clip_range", 1e-4, "agent.clip agent.clip_per_dim", "the log-ratio is a mean over dimensions there"),
    Row("train_timestep_fraction", 1.0, "agent.step_fraction"),
    Row("per_prompt_stat_tracking", False, "agent.advantage", "`prompt`, else `batch`"),
    Row("per_prompt_stat_tracking_buffer_size", 16, "agent.advantage_window"),
    Row(
        "per_prompt_stat_tracking_min_count", 16, "", "a prompt's own mean and deviation hold from its first rewards on"
    ),
    Row("async_reward_computation", False, "", "rewards are computed by the workers that walk, or served elsewhere"),
    Row("max_workers", 2, "", "threads of `async_reward_computation`; `rollout.workers` are processes"),
    Row("negative_prompts", "", "chain.negative", "one negative prompt, commas and all", TEXT),
    *SCRIPT,
)

ALIGNPROP = (
    *COMMON,
    Row("log_image_freq", 1, "monitor.every", "pictures on fixed seeds come with each look of the monitor"),
    Row(
        "train_batch_size",
        1,
        "agent.micro_batch rollout.item rollout.prompts",
        "walks of an optimiser step: this x the next",
    ),
    Row("train_gradient_accumulation_steps", 1, "rollout.prompts", "each epoch is one optimiser step"),
    *(Row(row.name, 1e-3, row.ours) if row.name == "train_learning_rate" else row for row in TRAINED),
    Row("negative_prompts", None, "chain.negative", "one negative prompt, commas and all", TEXT),
    Row("truncated_backprop_rand", True, "agent.steps", "the number of steps is fixed here: their mean number"),
    Row("truncated_backprop_timestep", 49, "agent.steps", "steps - this, where `truncated_backprop_rand` is false"),
    Row("truncated_rand_backprop_minmax", (0, 50), "agent.steps", "as `truncated_backprop_rand`", tuple[int, int]),
    *SCRIPT,
)


def ddpo(given: Given) -> tuple[Made, list[str]]:
    """Settings of DDPOConfig as ours."""
    made, said = _common(given)
    sizes, total = shared.walks(
        given["sample_batch_size"],
        given["sample_num_batches_per_epoch"],
        given["train_batch_size"],
        given["train_gradient_accumulation_steps"],
    )
    made |= sizes | shared.policy_gradient(
        given["train_clip_range"],
        given["train_adv_clip_max"],
        given["train_timestep_fraction"],
        given["train_num_inner_epochs"],
    )
    made |= {"agent.advantage": "prompt" if given["per_prompt_stat_tracking"] else "batch"}
    made |= {"agent.advantage_window": given["per_prompt_stat_tracking_buffer_size"]}
    said.append(shared.prompts_said(total))
    if not given["train_cfg"]:
        said.append(f"train_cfg = False: {shared.ALWAYS_GUIDED}")
    return made, said


def alignprop(given: Given) -> tuple[Made, list[str]]:
    """Settings of AlignPropConfig as ours: one optimiser step an epoch, through the end of the walk."""
    made, said = _common(given)
    sizes, total = shared.walks(given["train_batch_size"], given["train_gradient_accumulation_steps"], 1, 1)
    steps, random = _steps_with_gradients(given)
    made |= sizes | {"agent.updates_per_epoch": 1, "agent.micro_batch": given["train_batch_size"]}
    made |= {"agent.name": "draft", "agent.form": "last", "agent.steps": steps, "agent.epochs": 1}
    made |= {"agent.kl_loss": 0.0, "agent.ema_decay": 0.0, "monitor.every": given["log_image_freq"]}
    said += [*([random] if random else []), shared.prompts_said(total)]
    return made, said


def _steps_with_gradients(given: Given) -> tuple[int, str]:
    """The number of last steps whose network has gradients, and what is to be said of it.

    Raises:
        ConfigError: none has.
    """
    count = given["sample_num_steps"]
    if not given["truncated_backprop_rand"]:
        kept = min(count, count - given["truncated_backprop_timestep"])
        if kept < 1:
            raise ConfigError(
                f"truncated_backprop_timestep = {given['truncated_backprop_timestep']}: no step of {count} is trained"
            )
        return kept, ""
    low, high = given["truncated_rand_backprop_minmax"]
    if not 0 <= low <= high:
        raise ConfigError(f"truncated_rand_backprop_minmax = {(low, high)}: expected 0 <= the first <= the second")
    chances = (min(max(step - low + 1, 0), high - low + 1) / (high - low + 1) for step in range(count))
    mean = max(1, round(sum(chances)))
    return mean, (
        f"truncated_backprop_rand draws for each step whether it has a gradient, {mean} of {count} on average; here "
        f"the last {mean} have (agent.steps)"
    )


def _common(given: Given) -> tuple[Made, list[str]]:
    made: Made = {"root": given["logdir"], "seed": given["seed"]}
    made |= {"name": name} if (name := given["run_name"] or given["exp_name"]) else {}
    made |= _tracked(given)
    made |= {"updates": given["num_epochs"], "checkpoint_every": given["save_freq"], "tf32": given["allow_tf32"]}
    made |= {"checkpoints.last": given["num_checkpoint_limit"]}
    model, said = shared.model(given["pretrained_model"], given["use_lora"], given["mixed_precision"] or "no")
    negative = given["negative_prompts"] or ""
    chain = shared.chain(given["sample_num_steps"], given["sample_eta"], given["sample_guidance_scale"], negative)
    if negative and "chain.negative" not in chain:
        said.append(f"negative_prompts = {negative!r}: there is no guidance, which would lead away from it")
    return made | model | chain | shared.adam(given["train_learning_rate"], given, "train_"), said


def _tracked(given: Given) -> Made:
    """The trackers.

    Raises:
        ConfigError: one that TRL's settings cannot name.
    """
    known: dict[Any, list[str]] = {None: [], "tensorboard": [], "wandb": []}
    if given["log_with"] not in known:
        raise ConfigError(f"log_with = {given['log_with']!r}: expected wandb, tensorboard or null")
    return {"track": [f"wandb(project={given['tracker_project_name']!r})"]} if given["log_with"] == "wandb" else {}


TRL_DDPO = Program("ddpo", "TRL's DDPOConfig", DDPO, ddpo, CODE)
TRL_ALIGNPROP = Program("alignprop", "TRL's AlignPropConfig", ALIGNPROP, alignprop, CODE)
