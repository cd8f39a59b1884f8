"""What the DDPO of TRL and of ddpo-pytorch, and AlignProp, have in common, and how it becomes ours."""

from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.jobs.imports.table import Made

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "no": "float32", "none": "float32"}
ADAPTERS = "LoRA(rank=4, alpha=4, targets='to_q,to_k,to_v,to_out.0')"

NO_CHECKPOINT = "a checkpoint of accelerate is not read: begin again, or go on with --resume RUN from one of ours"
REVISION = "download that revision, and name its folder as `base`"
TRACKED = "always written are TensorBoard's files and metrics.jsonl"
ALWAYS_GUIDED = "the policy that is trained is the one that walked, guided as it was"
EPS = 1e-8
BETAS = (0.9, 0.999)


def optimizer(eight_bits: bool, betas: tuple[float, float], eps: float) -> str:
    """Adam with decoupled decay, as a text of ours."""
    settings = [] if tuple(betas) == BETAS else [f"betas=({betas[0]!r}, {betas[1]!r})"]
    settings += [] if eps == EPS else [f"eps={eps!r}"]
    name = "adamw8bit" if eight_bits else "adamw"
    return f"{name}({', '.join(settings)})" if settings else name


def precision(text: str) -> str:
    """The dtype of a pipeline's frozen weights.

    Raises:
        ConfigError: no such word of accelerate.
    """
    if text not in PRECISIONS:
        raise ConfigError(f"mixed_precision = {text!r}: expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[text]


def chain(steps: int, eta: float, scale: float, negative: str) -> Made:
    """The sampling chain: DDIM, guided by diffusers' ``guidance_scale``."""
    made: Made = {"chain.steps": steps, "chain.kernel": f"DDIM(eta={eta!r})", "chain.guidance_scale": scale}
    return made | ({"chain.negative": negative} if negative and scale > 1 else {})


def model(base: str, adapters: bool, dtype: str) -> tuple[Made, list[str]]:
    """The pretrained pipeline and what of it is trained."""
    if adapters:
        return {"base": base, "lora": ADAPTERS, "pipeline.dtype": precision(dtype)}, []
    made: Made = {"base": base, "pipeline.dtype": "float32", "pipeline.vae_dtype": precision(dtype)}
    if precision(dtype) == "float32":
        return made, []
    said = f"without adapters the weights that are trained are float32 here; mixed_precision {dtype} is the decoder's"
    return made | ({"precision": "bfloat16"} if dtype == "bf16" else {}), [said]


def walks(each: int, batches: int, batch: int, accumulated: int) -> tuple[Made, int]:
    """The walks of a rollout and their optimiser steps in a pass, of ``batch`` x ``accumulated`` walks each.

    Raises:
        ConfigError: the walks of an epoch are no whole number of steps, which both programs refuse, too.
    """
    for name, value in (
        ("sampling", each),
        ("batches per epoch", batches),
        ("training", batch),
        ("accum", accumulated),
    ):
        if value < 1:
            raise ConfigError(f"a batch size or count ({name}) = {value}: expected at least 1")
    total, step = each * batches, batch * accumulated
    if total % step:
        raise ConfigError(
            f"{total} walks an epoch (batch size of sampling {each} x batches {batches}) in optimiser steps of {step} "
            f"(batch size of training {batch} x accumulation {accumulated}): expected a whole number of steps"
        )
    return {
        "rollout.prompts": total,
        "rollout.samples_per_prompt": 1,
        "rollout.item": each,
        "agent.updates_per_epoch": total // step,
        "agent.micro_batch": batch,
    }, total


def prompts_said(total: int) -> str:
    """What is to be said of the prompts of a rollout."""
    return (
        f"each of the {total} walks of an epoch draws a prompt of its own there; a rollout here has so many different "
        f"prompts: with fewer prompts P in pipeline.prompts write rollout.prompts P and samples_per_prompt {total} / P"
    )


def policy_gradient(clip: float, advantage_clip: float, fraction: float, inner: int) -> Made:
    """The objective of both: a clipped ratio a dimension, no other limit, no KL, no average of weights."""
    return {
        "agent.name": "ddpo",
        "agent.form": "is",
        "agent.epochs": inner,
        "agent.clip": clip,
        "agent.clip_per_dim": True,
        "agent.dual_clip": None,
        "agent.advantage_clip": float(advantage_clip),
        "agent.step_fraction": fraction,
        "agent.kl_loss": 0.0,
        "agent.ema_decay": 0.0,
        "agent.pace": None,
        "agent.step_weight": "none",
    }


def adam(lr: float, given: Any, prefix: str) -> Made:
    """The optimiser of the settings whose names begin with ``prefix``."""
    betas = (given[f"{prefix}adam_beta1"], given[f"{prefix}adam_beta2"])
    return {
        "agent.lr": lr,
        "agent.optimizer": optimizer(given[f"{prefix}use_8bit_adam"], betas, given[f"{prefix}adam_epsilon"]),
        "agent.weight_decay": given[f"{prefix}adam_weight_decay"],
        "agent.max_grad_norm": given[f"{prefix}max_grad_norm"],
    }
