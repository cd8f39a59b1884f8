"""Regression of a policy on weighted walks: what DRWR and DAWR share (handbook 3.3.2, errata 83, 84; Ren et al. 2024).

Every walk, or every transition of it, has a weight w >= 0, a constant (``advantage``, Eq. 5).

    (1)  on = "noised":  E w w(t) | y_theta(x_t, t, c) - (a x_0 + b eps) |^2,     x_t = alpha x_0 + sigma eps, fresh
         the loss of the model's own training (``pretrain.denoising``) in what its network predicts, on scored samples
    (2)  on = "chain":   - E sum_t w log p_theta(x_s | x_t, c) over the stochastic steps of the stored walk
         on = "centred": the same for walks of the present weights, acting, in expectation:
         E sum_t [ - (w - 1) log p_theta(x_s | x_t, c) + KL(p_theta(. | x_t, c) || p_acting(. | x_t, c)) ]
    (3)  plus kl times   | y_theta - y_base |^2  (noised),  or  sum_t KL(p_theta || p_base)  (chain)
    (4)  plus pretrain_weight times the loss of the base model's own training, on its own data

Fixed points, for samples of a density q(x_0 | c) and a network that can be anything:
(1) is minimised by the denoiser of q w / E_q w, whatever w(t). Scale does not matter: neither a constant factor (the
mean of all, exp(-max)) nor one that depends on (x_t, t, c) alone changes the minimiser at any x_t.
With (3) and q the base's own law the weights are w + kl: the mixture (q w + kl q) / (E_q w + kl), a floor under all
that the base can draw. With (4) it is the mixture (q w + pretrain_weight p_data) / (E_q w + pretrain_weight).
(2) moves the mean of each step to E_w[x_s | x_t], that of the walk reweighted by w, which is exact as steps become
small (their std is the kernel's and stays); the last, noise-free step needs no change. The prior at pure noise cannot
move: there the weights act in so far as they differ between walks that begin alike.
"centred" takes the part of the weights that is 1 out of the sampled noise: given x_t, E log p_theta(x_s) is -KL up to
a constant. The expected loss, its gradient at any theta and the fixed point are those of "chain", to a fraction of the
variance: with z-scored A and a moderate beta most of a mean weight of 1 says nothing of the reward.
For a few-step consistency policy choose (2): (1) makes a denoiser of it, whose single step is a blur.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlfusion.common import spec
from rlfusion.common.seeding import stream
from rlfusion.common.tensors import map_cond, moved
from rlfusion.common.weights import learned, require_entries, restore
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import answer
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.diffusion.schedule import level
from rlfusion.objectives.renoise import fresh, noised
from rlfusion.objectives.times import TIMES
from rlfusion.pretrain.denoising import Denoising
from rlfusion.pretrain.pretraining_term import PretrainingTerm
from rlfusion.rl.transitions import Terms, Transitions
from rlfusion.rl.weighted_settings import Settings
from rlfusion.rollout import Task
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.optimization import Optimization, average
from rlfusion.training.ranks import current

ON_POLICY = 1.0
"""Nats, a tenth of which a first batch's log-probabilities may be off (numerics alone)."""


class Places(NamedTuple):
    """Where N weights are asked for: ``walk`` (N,) of the batch, and the ``step`` (N,) of its chain, or the noised
    state ``x()`` (N, *) at time ``t`` (N,).
    """

    walk: Tensor
    step: Tensor | None = None
    x: Callable[[], Tensor] | None = None
    t: Tensor | None = None


Weigh = Callable[[Places], Tensor]
"""The weight of each place, (N,)."""


class Form(Protocol):
    """Eq. (1) or (2), with (3)."""

    base: Policy | None

    def begin(self, batch: Trajectory) -> None:
        """Take in what the policy says of a batch before it is updated."""

    def accumulate(self, batch: Trajectory, walks: Tensor, weigh: Weigh, *key: int | str) -> list[dict[str, Tensor]]:
        """Accumulate the gradient of the mean over ``walks`` of the batch; records of loss and, with a base, kl."""

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        """Compare a first rollout with the learner's own numbers."""


class Noising(Protocol):
    """What Eq. (1) and (3) are told: settings of a weighted regression, or of one of stored samples."""

    @property
    def loss(self) -> Denoising:
        """Eq. (1) of one sample."""

    @property
    def kl(self) -> float:
        """The coefficient of Eq. (3)."""

    @property
    def times(self) -> str:
        """How t is drawn."""

    @property
    def noisings(self) -> int:
        """Times that each sample is noised in a pass."""

    @property
    def micro_batch(self) -> int:
        """Noised samples in one network call."""


class OnNoised:
    """Eq. (1)."""

    def __init__(self, policy: Policy, config: "Noising") -> None:
        self.policy, self.config = policy, config
        self.base = frozen_copy(policy) if config.kl else None
        self.times = spec.parse(config.times, TIMES, "distribution of times")

    def begin(self, batch: Trajectory) -> None:
        pass

    def accumulate(self, batch: Trajectory, walks: Tensor, weigh: Weigh, *key: int | str) -> list[dict[str, Tensor]]:
        rows = walks.expand(self.config.noisings, -1).flatten().to(batch.x.device)
        t, eps = fresh(batch.x, len(rows), self.policy.schedule, self.times, key)
        weight = weigh(Places(rows, x=lambda: noised(batch.x[rows, -1], eps, t, self.policy.schedule), t=t))

        def part(some: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            at = moved(some, rows.device)
            record = self._record(batch, rows[at], t[some], eps[at], weight[at])
            return record["loss"].sum() / len(rows), record

        ranks = current()
        return ranks.accumulate(self.policy, ranks.share(rows, len(batch)), self.config.micro_batch, part)

    def _record(self, batch: Trajectory, rows: Tensor, t: Tensor, eps: Tensor, weight: Tensor) -> dict[str, Tensor]:
        x0, cond = batch.x[rows, -1], map_cond(lambda c: c[moved(rows, c.device)], batch.cond)
        x, l = noised(x0, eps, t, self.policy.schedule), level(self.policy.schedule, t, x0)
        model, loss = self.policy.denoiser, self.config.loss
        y = answer(model, x, t, cond)
        error = weight * loss.distance(y, target(model.kind, x0, eps, l), model.kind, l)
        if self.base is None:
            return {"loss": error}
        with torch.no_grad():
            base = answer(self.base.denoiser, x, t, cond)
        kl = loss.distance(y, base, model.kind, l)
        return {"loss": error + self.config.kl * kl, "kl": kl}

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        return {}


class OnChain:
    """Eq. (2)."""

    def __init__(self, policy: Policy, times: Tensor, config: Settings) -> None:
        """
        Raises:
            ConfigError: no step of the chain is stochastic.
        """
        self.transitions = Transitions(policy, times, config.micro_batch, bool(config.kl))
        self.base, self.kl, self.centred = self.transitions.reference, config.kl, config.on == "centred"
        self.acting: Tensor | None = None

    def begin(self, batch: Trajectory) -> None:
        """The means of the acting policy's steps, (B, K, *)."""
        self.acting = self.transitions.refer(batch, self.transitions.policy).mean if self.centred else None

    def accumulate(self, batch: Trajectory, walks: Tensor, weigh: Weigh, *key: int | str) -> list[dict[str, Tensor]]:
        def objective(terms: Terms) -> Tensor:
            weight, own = weigh(Places(terms.walk, terms.step)), terms.distribution
            if self.acting is None:
                return -weight * terms.log_prob
            acting = Gaussian(self.acting[terms.walk, terms.step], own.std)
            return (1 - weight) * terms.log_prob + own.kl(acting)

        reference = None if self.base is None else self.transitions.refer(batch, walks=walks)
        places = self.transitions.all(walks)
        records = self.transitions.accumulate(batch, *places, objective, reference, self.kl)
        steps = len(self.transitions.steps)
        return [{name: steps * record[name] for name in ("loss", "kl") if name in record} for record in records]

    def preflight(self, batch: Trajectory) -> dict[str, float]:
        return self.transitions.require_on_policy(batch, ON_POLICY)


class Regression:
    """Eq. (1) to (4) over one policy and time grid: the passes over a rollout, and the optimiser."""

    def __init__(self, task: Task, config: Settings, data: Dataset, seed: int) -> None:
        """``seed`` keys the order of the walks and the noise.

        Raises:
            ConfigError: a chain without noise with ``on`` "chain", or a pretraining loss that the model cannot have.
        """
        self.policy, self.config, self.seed = task.policy, config, seed
        noised = config.on == "noised"
        self.form: Form = OnNoised(task.policy, config) if noised else OnChain(task.policy, task.times, config)
        term = PretrainingTerm(
            config.pretrain_weight, config.pretrain_loss, config.pretrain_batch, config.label_dropout
        )
        self.pretraining_term = term.of(task.policy.denoiser, data, seed, "weighted")
        self.optimization = Optimization.of(task.policy, config)

    def fit(self, batch: Trajectory, count: int, weigh: Weigh, iteration: int) -> dict[str, float]:
        """The updates of rollout ``iteration``, each pass over ``count`` walks of ``batch`` drawn without replacement.

        Returns:
            loss (a walk's sum over its steps on the chain), grad_norm, with a base kl (so, too), and with the own loss
            more.

        Raises:
            NumericalError: a weight or a gradient is not finite; the update that it belongs to has not been made.
        """
        self.form.begin(batch)
        records, norms, more = [], [], []
        updates = self.config.epochs * self.config.updates_per_epoch
        for number, walks in enumerate(self._parts(len(batch), count, iteration)):
            self.optimization.clear()  # of an update that was broken off
            records += self.form.accumulate(batch, walks, weigh, self.seed, "weighted noise", iteration, number)
            if self.pretraining_term:
                more.append(self.pretraining_term(iteration * updates + number))
                more[-1].backward()
            norms.append(self.optimization.step())
        joined = {name: torch.cat([record[name] for record in records]).mean() for name in records[0]}
        extra = {"more": torch.stack(more).mean().item()} if more else {}
        return average([joined]) | extra | {"grad_norm": sum(norms) / len(norms)}

    def _parts(self, held: int, count: int, iteration: int) -> Iterator[Tensor]:
        """The walks of each optimiser step."""
        for epoch in range(self.config.epochs):
            draw = stream(self.seed, "weighted", iteration, epoch)
            yield from current().passes(draw, held, self.config.updates_per_epoch, count)

    def state_dict(self) -> dict:
        state = {"optimization": self.optimization.state_dict()}
        return state if self.form.base is None else state | {"base": learned(self.form.base)}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the regression")
        self.optimization.load_state_dict(state["optimization"])
        if self.form.base is not None:
            restore(self.form.base, state["base"])
