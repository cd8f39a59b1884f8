"""What every scalar of a run means: the one table of it, from which ``docs/metrics.md`` is written.

A test holds the page to the table, and the table to what agents, monitor, evaluations and timing write.
"""

import re
from typing import NamedTuple


class Scalar(NamedTuple):
    """A scalar of TensorBoard and ``metrics.jsonl``.

    Attributes:
        tag: group/name; NAME stands for a name of yours, as of a reward.
        meaning: what it is, with its unit.
        healthy: what is usual.
        otherwise: what to do where it is not; "" where nothing is wrong with any value.
    """

    tag: str
    meaning: str
    healthy: str = ""
    otherwise: str = ""


GROUPS: dict[str, tuple[Scalar, ...]] = {
    "Rewards, of each rollout": (
        Scalar(
            "train/reward",
            "mean reward of the walks that were learned from",
            "rises, noisily",
            "see `train/advantage_std`, `agent.lr`",
        ),
        Scalar(
            "train/reward_std",
            "standard deviation of these rewards",
            "above 0",
            "0: all are equal, nothing can be learned; see check-reward",
        ),
        Scalar(
            "train/reward_NAME",
            "mean of one of several rewards",
            "each rises or stays",
            "one falls: give it more weight",
        ),
        Scalar(
            "train/share_NAME",
            "share of one of several rewards in the spread of their sum",
            "as you want it",
            "set weights, or `reward_normalize`",
        ),
        Scalar(
            "constraint/NAME/multiplier",
            "Lagrange multiplier of a constraint on a reward (`constraint`)",
            "0 while it is met with room; else rises and settles",
            "rises for ever: the bound cannot be met, or lower `constraint_rate`; swings: lower `constraint_rate`",
        ),
        Scalar("constraint/NAME/value", "mean of that reward in the rollout", "at the bound, or on its good side"),
        Scalar("constraint/NAME/bound", "the bound: a number, or the base model's mean"),
        Scalar("train/queries", "rewards asked for so far"),
        Scalar(
            "train/failed",
            "share of rewards that failed and were left out (`reward_failures mask`)",
            "0",
            "read the reward server's log",
        ),
        Scalar("train/cached", "share of rewards that were known already (`reward_cache`)"),
        Scalar("train/lag", "updates by which the weights of the rollout were old", "0 to `rollout.lag`"),
    ),
    "Updates of all agents": (
        Scalar(
            "train/loss", "the loss that was descended; of policy gradients its value says nothing, its gradient does"
        ),
        Scalar(
            "train/grad_norm",
            "norm of the gradient before it is clipped, mean over the optimiser's steps",
            "of one size through the run",
            "growing: lower `agent.lr`",
        ),
        Scalar(
            "train/kl",
            "KL to the base model, where the loss has it, or to the teacher (opd), in nats a step or walk (the agent's page)",
            "grows slowly; to a teacher it falls",
            "fast: raise `agent.kl_loss`, lower `agent.lr`",
        ),
        Scalar(
            "train/more",
            "the pretraining term of the loss, where there is one",
            "stays near its first value",
            "rises: raise its weight",
        ),
        Scalar(
            "train/skipped",
            "updates in a row that the guard has undone",
            "0",
            "the line that it prints names the limit and the remedy",
        ),
        Scalar(
            "train/updates_made",
            "optimiser steps of the rollout that `agent.target_kl` left",
            "all, or most of them",
            "1 all the time: lower `agent.lr`, or fewer updates a rollout",
        ),
        Scalar(
            "train/lr_share",
            "share of `agent.lr` in use (`agent.pace`)",
            "falls and settles",
            "1 all the time: `agent.lr` is the limit",
        ),
        Scalar(
            "train/shift",
            "rms change of the policy's mean by the update, in its standard deviations a dimension",
            "about `agent.pace`",
        ),
    ),
    "Likelihood ratios (ddpo, grpo, ppo, awm, dpo)": (
        Scalar(
            "train/advantage_std",
            "standard deviation of the advantages",
            "about 1 where groups are normalised",
            "0: rewards within groups are equal",
        ),
        Scalar(
            "train/log_ratio_first",
            "largest |log ratio| before the first optimiser step",
            "rounding (1e-3), or a lag's",
            "larger: rollout and learner disagree (docs/troubleshooting.md)",
        ),
        Scalar(
            "train/log_ratio_max",
            "largest |log ratio| of the update, in nats",
            "a few times the clip",
            "lower `agent.lr`, or fewer `agent.epochs`",
        ),
        Scalar(
            "train/approx_kl",
            "r - 1 - log r, mean: an estimate of the KL to the acting policy",
            "below 0.1",
            "lower `agent.lr`",
        ),
        Scalar(
            "train/ess",
            "effective share of the walks under the ratios, (sum r)^2 / (N sum r^2)",
            "above 0.8",
            "lower: lower `agent.lr`",
        ),
        Scalar(
            "train/clip_fraction",
            "share of ratios outside of the clip; of `grpo` those that `agent.ratio_norm` and `agent.divergence` hold",
            "0.05 to 0.3 from the second step on",
            "higher: lower `agent.lr`",
        ),
        Scalar(
            "train/behaviour_ess",
            "effective share of walks of older weights (`rollout.lag`)",
            "above 0.5",
            "the lag is shortened by itself; lower `rollout.lag`",
        ),
        Scalar("train/window_first", "first step of the window that was trained (grpo)"),
        Scalar(
            "train/pairs",
            "pairs, of walks or stored, that the update has learned from (dpo)",
            "above 0",
            "0: rewards within prompts are equal",
        ),
        Scalar("train/accuracy", "share of pairs that the policy orders as the reward does", "0.5, then higher"),
        Scalar("train/margin", "mean margin of the preferred walk over the other", "rises from 0"),
        Scalar(
            "train/matching",
            "the policy's loss of denoising its own samples, a feature (awm)",
            "near its first value, or slowly lower",
            "rises: the network no longer denoises what it draws; lower `agent.lr`, raise `agent.kl_loss`",
        ),
        Scalar("train/eta", "share of the old policy in the one that acts (nft)", "rises to `agent.eta_max`"),
    ),
    "Weights of walks (drwr, dawr)": (
        Scalar(
            "train/weight_ess",
            "(sum w)^2 / (N sum w^2) of the weights of the walks",
            "0.1 to 0.9",
            "lower: lower `agent.beta`",
        ),
        Scalar(
            "train/clipped",
            "share of weights at their largest value",
            "below 0.1",
            "higher: lower `agent.beta`, or raise `agent.w_max`",
        ),
        Scalar("train/held", "walks in the memory"),
        Scalar("train/value_loss", "loss of the learned value of each step", "falls"),
        Scalar("train/critic_loss", "loss of the critic or of Q", "falls"),
        Scalar(
            "train/explained_variance",
            "share of the variance of new rewards that the critic foresees",
            "rises above 0",
            "below 0: it learns too little",
        ),
    ),
    "Q (qsm)": (
        Scalar("train/q", "mean of Q at the states that were learned from", "rises"),
        Scalar("train/q_gradient", "rms of dQ/dx", "of one size through the run", "growing: lower `agent.alpha`"),
    ),
    "Evaluations on fixed seeds": (
        Scalar("evaluation/reward", "mean reward of the averaged weights, with the chain's own sampler", "rises"),
        Scalar("evaluation/reward_std", "standard deviation of these rewards"),
        Scalar("evaluation/reward_NAME", "mean of one of several rewards, in its own unit", "each rises or stays"),
        Scalar("evaluation/reward_failed", "share of rewards that failed", "0"),
        Scalar(
            "evaluation/gain",
            "(reward - the base's) / the standard deviation of the base's rewards",
            "above 0, to compare runs of any reward by",
        ),
        Scalar(
            "evaluation/agreement",
            "share of samples that the judge takes for the class that was asked",
            "not below the base's",
            "falls: the reward is gamed; raise the KL",
        ),
        Scalar(
            "evaluation/frechet",
            "Frechet distance to the held-out data, in the judge's features; of as many samples as before training alone",
            "not far above its first value",
            "rises: raise `agent.kl_loss`, stop earlier",
        ),
        Scalar("evaluation/frechet_floor", "the same of the training data: what a perfect sampler gets"),
        Scalar(
            "evaluation/precision",
            "share of samples within the manifold of the data",
            "about 1",
            "falls: samples are no data any more",
        ),
        Scalar(
            "evaluation/recall",
            "share of the data within the manifold of the samples",
            "not far below the base's",
            "falls: modes are lost",
        ),
        Scalar(
            "evaluation/diversity",
            "mean distance of two samples of a class or prompt",
            "not far below the base's",
            "falls: all samples become one",
        ),
        Scalar("evaluation/diversity_relative", "the same over that of the data", "about 1"),
        Scalar("evaluation/brightness", "mean brightness of the samples, 0 to 1", "as the reward wants it"),
        Scalar("evaluation/edge_density", "mean size of the samples' gradients", "as the reward wants it"),
        Scalar("evaluation/entropy", "mean entropy of the samples' grey levels, in bits", "as the reward wants it"),
        Scalar(
            "evaluation/bits_per_dim",
            "bound on the likelihood of the held-out data, in bits a dimension (`evaluation.bits_per_dim`)",
            "lower is better",
        ),
        Scalar("evaluation/count", "number of samples; fewer on the way (`evaluation.every auto`)"),
        Scalar("evaluation/NAME_real", "the same figure of held-out data: what to compare with"),
        Scalar(
            "evaluation/contrast",
            "further figures of `evaluation.metrics`: contrast, saturation, sharpness, or your own",
        ),
        Scalar("evaluation/saturation", "mean saturation of the samples' colours (`evaluation.metrics`)"),
        Scalar("evaluation/sharpness", "mean sharpness of the samples (`evaluation.metrics`)"),
        Scalar(
            "evaluation_ode/NAME",
            "the same figure with the deterministic sampler, DDIM(eta=0), with which many will sample",
            "near the other",
            "far: train with less noise, or sample as in training",
        ),
        Scalar("final/NAME", "the last evaluation, the gain, the queries and the seconds of training, for HPARAMS"),
        Scalar("final/goal", "gain of the goal: `target` of the comparison, of any other run 2"),
        Scalar(
            "final/NAME to the goal", "queries, seconds or CPU seconds of training until that gain, before any alarm"
        ),
        Scalar("final/NAME at the goal", "Frechet distance (of as many samples as at the end), or diversity, there"),
    ),
    "The monitor: what the reward does not see": (
        Scalar(
            "monitor/alarms",
            "alarms of this look",
            "0",
            "read `diagnosis.md`; the reward is gamed: raise the KL, add a held-out reward",
        ),
        Scalar("monitor/reward", "mean reward of the monitor's samples, on fixed seeds", "rises"),
        Scalar("monitor/gain", "as `evaluation/gain`, of the monitor's samples", "rises"),
        Scalar(
            "monitor/NAME", "mean of a held-out reward", "not below the base's", "falls while the reward rises: gamed"
        ),
        Scalar("monitor/diversity", "diversity within a prompt over the base's", "above `monitor.diversity`"),
        Scalar("monitor/agreement", "agreement with the judge", "not below the base's by `monitor.agreement`"),
        Scalar("monitor/frechet_base", "Frechet distance to the base's samples", "grows slowly"),
        Scalar(
            "monitor/brightness", "change of brightness, in the base's standard deviations", "within `monitor.image`"
        ),
        Scalar(
            "monitor/edge_density",
            "change of edge density, in the base's standard deviations",
            "within `monitor.image`",
        ),
        Scalar("monitor/entropy", "change of entropy, in the base's standard deviations", "within `monitor.image`"),
        Scalar("monitor/kl", "KL of the walks to the base model, in nats a walk", "below `monitor.kl`, where set"),
    ),
    "Runs beside one another (TensorBoard alone, of a comparison; NAME is its reward)": (
        Scalar("compare_NAME/NAME by queries", "gain, diversity, Frechet distance, agreement of each evaluation"),
        Scalar("compare_NAME/gain by CPU seconds", "the axis is whole CPU seconds of training"),
        Scalar("compare_NAME/gain by hundredths of a CPU second", "in its place where no run has taken 100 of them"),
        Scalar("compare_NAME/gain by Frechet distance x 100", "the axis is hundredths of `evaluation/frechet`"),
    ),
    "Time (TensorBoard and `timing.jsonl`, of this machine)": (
        Scalar("timing/queries", "rewards asked for so far"),
        Scalar("timing/seconds", "seconds of training since the run began, evaluations aside"),
        Scalar("timing/cpu_seconds", "CPU seconds of this process"),
        Scalar(
            "timing/seconds/NAME",
            "seconds of an update in a stage: rollout, idle, reward, learn, publish, checkpoint",
            "",
            "idle is large: more workers, or `rollout.lag`",
        ),
        Scalar("timing/bytes/NAME", "bytes moved between processes in an update"),
        Scalar(
            "timing/utilisation",
            "1 - share of the time in which the learner waits",
            "above 0.8",
            "more workers, or `rollout.lag`",
        ),
        Scalar("timing/samples_per_second", "walks learned from a second"),
        Scalar("timing/flops_per_second", "floating-point operations of the network a second of learning"),
        Scalar(
            "timing/mfu",
            "the same over the device's peak, where it is known",
            "0.2 to 0.6 on a large GPU",
            "larger `agent.micro_batch`",
        ),
    ),
    "Pretraining, distillation, autoencoders, CLIP": (
        Scalar("pretrain/loss", "the objective's loss", "falls"),
        Scalar("pretrain/grad_norm", "norm of the gradient before it is clipped", "of one size"),
        Scalar("pretrain/lr", "learning rate"),
        Scalar("distill/loss", "the method's loss", "falls, or stays for losses against a moving target"),
        Scalar("distill/grad_norm", "norm of the gradient before it is clipped", "of one size"),
        Scalar("distill/lr", "learning rate"),
        Scalar("distill/stage", "the halving, or the round of pairs, at work"),
        Scalar("distill/direction", "mean size of w (fake - teacher) (vsd, dmd)", "falls"),
        Scalar(
            "distill/fake_loss",
            "loss of the denoiser of the student's own samples",
            "of one size",
            "growing: more updates of the fake",
        ),
        Scalar("distill/adversarial", "the student's loss against the discriminator", "of one size"),
        Scalar(
            "distill/discriminator_loss",
            "the discriminator's loss",
            "of one size",
            "near 0: it has won; lower its weight",
        ),
        Scalar(
            "distill/discriminator_accuracy", "share of samples that it tells rightly", "0.6 to 0.9", "1: it has won"
        ),
        Scalar("distill/regression", "loss on pairs of the teacher's", "falls"),
        Scalar("autoencoder/error", "rms error of the reconstructions", "falls"),
        Scalar("autoencoder/negative_elbo", "bound on the likelihood", "falls"),
        Scalar("autoencoder/grad_norm", "norm of the gradient before it is clipped", "of one size"),
        Scalar("evaluation/error", "rms error of held-out reconstructions", "falls"),
        Scalar("evaluation/latent_std", "standard deviation of the latents", "about 1"),
        Scalar("clip/loss", "the contrastive loss", "falls"),
        Scalar("clip/grad_norm", "norm of the gradient before it is clipped", "of one size"),
    ),
}


def find(tag: str) -> Scalar | None:
    """The row of a scalar, None where the table has none; a row without NAME comes first."""
    rows = [row for group in GROUPS.values() for row in group if _pattern(row.tag).fullmatch(tag)]
    return min(rows, key=lambda row: "NAME" in row.tag, default=None)


def _pattern(tag: str) -> re.Pattern[str]:
    return re.compile(re.escape(tag).replace("NAME", ".+"))


def page() -> str:
    """``docs/metrics.md``."""
    lines = [
        "# What every curve says",
        "",
        "A run's scalars, in TensorBoard and, but for `timing/`, `final/` and `compare_NAME/`, in `metrics.jsonl`. NAME stands for a",
        "name of yours. An agent of your own adds its own under `train/`. This page is written by `make help` from",
        "`rlfusion/training/scalars.py`.",
    ]
    for title, rows in GROUPS.items():
        lines += ["", f"## {title}", "", "| scalar | meaning | healthy | otherwise |", "|---|---|---|---|"]
        lines += [
            f"| `{row.tag}` | {row.meaning.replace('|', chr(92) + '|')} | {row.healthy} | {row.otherwise} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
