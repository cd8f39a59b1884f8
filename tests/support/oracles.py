"""Closed forms that tests compare with: float64 numpy, and no import of rlfusion.

    (1)  x_t = a x_0 + b eps,   x_0 ~ sum_i w_i N(m_i, C_i):   x_t ~ sum_i w_i N(a m_i, S_i),   S_i = a^2 C_i + b^2
    (2)  E[x_0 | x] = sum_i p_i(x) (m_i + a C_i S_i^-1 (x - a m_i)),   E[eps | x] = sum_i p_i(x) b S_i^-1 (x - a m_i)
    (3)  a step  x_s = A x0_hat + B eps_hat + S z  on N(m, lam) data with the exact denoiser is affine in x, slope
         (A a lam + B b) / V, V = a^2 lam + b^2: so the law of a whole chain is a recursion of means and variances
    (4)  the coefficients (A, B, S) of the kernels, from alpha_bar as the handbook prints them (corrected)
    (5)  the linear-Gaussian chain: see ``LinearGaussianChain``

handbook-notes 2.2.1, 2.2.3, 3.3.2 and the oracle table, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp, ndtr

Array = np.ndarray
Step = tuple[float, float, float, float, float]
"""(a, b, A, B, S): the level where a step begins, and its coefficients."""


@dataclass(frozen=True)
class Mixture:
    """weight (n,), mean (n, d), cov (n, d, d). One component is a Gaussian."""

    weight: Array
    mean: Array
    cov: Array

    @classmethod
    def scalar(cls, weight: list[float], mean: list[float], var: list[float]) -> "Mixture":
        """A 1-D mixture."""
        return cls(np.array(weight), np.array(mean)[:, None], np.array(var)[:, None, None])

    @cached_property
    def _chol(self) -> Array:
        return np.linalg.cholesky(self.cov)

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        i = rng.choice(len(self.weight), n, p=self.weight)
        return self.mean[i] + np.einsum("nij,nj->ni", self._chol[i], rng.standard_normal((n, self.mean.shape[1])))

    def diffuse(self, a: float, b: float) -> "Mixture":
        """Eq. (1)."""
        return Mixture(self.weight, a * self.mean, a**2 * self.cov + b**2 * np.eye(self.mean.shape[1]))

    def _log_parts(self, x: Array) -> Array:
        """log w_i N(x; m_i, C_i), (B, n)."""
        z = np.linalg.solve(self._chol[None], (x[:, None] - self.mean)[..., None])[..., 0]
        log_det = np.log(np.diagonal(self._chol, axis1=1, axis2=2)).sum(1)
        return np.log(self.weight) - (z**2).sum(2) / 2 - log_det - x.shape[1] / 2 * np.log(2 * np.pi)

    def log_density(self, x: Array) -> Array:
        return logsumexp(self._log_parts(x), axis=1)

    def cdf(self, x: Array) -> Array:
        """1-D: P(X <= x), x any shape."""
        z = (x[..., None] - self.mean[:, 0]) / np.sqrt(self.cov[:, 0, 0])
        return ndtr(z) @ self.weight

    def _pull(self, x: Array, a: float, b: float) -> tuple[Array, Array]:
        """p_i(x), (B, n), and S_i^-1 (x - a m_i), (B, n, d)."""
        at = self.diffuse(a, b)
        parts = at._log_parts(x)
        pulled = np.linalg.solve(at.cov[None], (x[:, None] - at.mean)[..., None])[..., 0]
        return np.exp(parts - logsumexp(parts, axis=1, keepdims=True)), pulled

    def x0(self, x: Array, a: float, b: float) -> Array:
        """E[x_0 | x_t = x], Eq. (2); x (B, d)."""
        p, pulled = self._pull(x, a, b)
        return np.einsum("bi,bij->bj", p, self.mean + a * np.einsum("ijk,bik->bij", self.cov, pulled))

    def eps(self, x: Array, a: float, b: float) -> Array:
        """E[eps | x_t = x], Eq. (2)."""
        p, pulled = self._pull(x, a, b)
        return b * np.einsum("bi,bij->bj", p, pulled)

    def x0_var(self, x: Array, a: float, b: float) -> Array:
        """tr Cov[x_0 | x_t = x], (B,): within the components, C_i - a^2 C_i S_i^-1 C_i, and between their means."""
        p, pulled = self._pull(x, a, b)
        means = self.mean + a * np.einsum("ijk,bik->bij", self.cov, pulled)
        at = self.diffuse(a, b)
        within = np.trace(self.cov - a**2 * self.cov @ np.linalg.solve(at.cov, self.cov), axis1=1, axis2=2)
        return (p * (within + (means**2).sum(2))).sum(1) - (np.einsum("bi,bij->bj", p, means) ** 2).sum(1)

    def score(self, x: Array, a: float, b: float) -> Array:
        """grad log p_t(x) = -E[sum_i p_i S_i^-1 (x - a m_i)]: also where b = 0."""
        p, pulled = self._pull(x, a, b)
        return -np.einsum("bi,bij->bj", p, pulled)

    def tilt(self, k: float, r: Array, beta: float = 1.0) -> "Mixture":
        """p exp(beta R) / Z for R(x) = -k |x - r|^2 / 2."""
        d = self.mean.shape[1]
        prec = np.linalg.inv(self.cov)
        cov = np.linalg.inv(prec + beta * k * np.eye(d))
        pull = np.einsum("ijk,ik->ij", prec, self.mean) + beta * k * np.asarray(r)
        spread = Mixture(self.weight, self.mean, self.cov + np.eye(d) / (beta * k))
        log_w = spread._log_parts(np.broadcast_to(np.asarray(r, float), (1, d)))[0]
        return Mixture(np.exp(log_w - logsumexp(log_w)), np.einsum("ijk,ik->ij", cov, pull), cov)


def flow_map(law: Mixture, x: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
    """The probability-flow ODE from level ``start`` to ``end`` in 1-D: the quantile map; x (B,)."""
    at, to = law.diffuse(*start), law.diffuse(*end)
    goal, low, high = at.cdf(x), np.full_like(x, -50.0), np.full_like(x, 50.0)
    for _ in range(80):
        mid = (low + high) / 2
        below = to.cdf(mid) < goal
        low, high = np.where(below, mid, low), np.where(below, high, mid)
    return (low + high) / 2


def posterior_draw(law: Mixture, x: Array, ratio: Array, rng: np.random.Generator) -> Array:
    """Draws of x_0 given x = x_0 + ratio eps in 1-D, one for each element of both: the component, then within it."""
    x, ratio = np.broadcast_arrays(x, ratio)
    mean, var = law.mean[:, 0], law.cov[:, 0, 0]
    spread = var + ratio[..., None] ** 2
    gap = x[..., None] - mean
    log_p = np.log(law.weight) - gap**2 / (2 * spread) - np.log(spread) / 2
    p = np.exp(log_p - logsumexp(log_p, axis=-1, keepdims=True))
    i = (rng.random(x.shape)[..., None] > p.cumsum(-1)[..., :-1]).sum(-1)
    share, gap = (np.take_along_axis(v, i[..., None], -1)[..., 0] for v in (var / spread, gap))
    return mean[i] + share * gap + ratio * np.sqrt(share) * rng.standard_normal(x.shape)


def consistency_on_grid(law: Mixture, sigma: Array, nodes: int = 400) -> tuple[list[CubicSpline], Array]:
    """Where consistency training in 1-D ends on the grid x_n = x_0 + sigma_n eps, n = 0..N: the functions

        f_0(x) = x,   f_{n+1}(x) = E[f_n(x_n) | x_{n+1} = x],   and the loss E Var(f_n(x_n) | x_{n+1}) of each interval.

    Given x_{n+1} and the component, x_n = (1 - r) x_0 + r x_{n+1}, r = sigma_n / sigma_{n+1}, is normal: Gauss-Hermite.
    As the grid grows fine, f_n tends to ``flow_map``.
    """
    z, weight = np.polynomial.hermite_e.hermegauss(12)
    weight, unit = weight / weight.sum(), np.linspace(-7.0, 7.0, nodes)
    mean = law.weight @ law.mean[:, 0]
    var = law.weight @ (law.cov[:, 0, 0] + (law.mean[:, 0] - mean) ** 2)
    x = mean + np.sqrt(var + sigma[0] ** 2) * unit
    functions, losses = [CubicSpline(x, x)], []
    for low, high in pairwise(sigma):
        y = mean + np.sqrt(var + high**2) * unit
        p, pulled = law._pull(y[:, None], 1.0, high)
        x0 = law.mean[:, 0] + law.cov[:, 0, 0] * pulled[..., 0]
        std = np.sqrt(law.cov[:, 0, 0] * high**2 / (law.cov[:, 0, 0] + high**2))
        r = low / high
        reached = (1 - r) * (x0[..., None] + std[:, None] * z) + r * y[:, None, None]
        f = functions[-1](np.clip(reached, x[0], x[-1]))
        first, second = (np.einsum("bi,bij,j->b", p, power, weight) for power in (f, f**2))
        density = np.exp(law.diffuse(1.0, high).log_density(y[:, None]))
        losses.append(((second - first**2) * density).sum() * (y[1] - y[0]))
        functions.append(CubicSpline(y, first))
        x = y
    return functions, np.array(losses)


def loss_floor(lam: Array, c0: float, c1: float, a: float, b: float) -> float:
    """The least mean squared error, summed over features, of any predictor of c0 x_0 + c1 eps on N(m, diag lam)."""
    lam = np.asarray(lam)
    return float(((c0 * b - c1 * a) ** 2 * lam / (a**2 * lam + b**2)).sum())


# Eq. (4): kernels from alpha_bar


def ddim(ab_t: float, ab_s: float, eta: float) -> tuple[float, float, float]:
    """(A, B, S) of DDIM(eta), Eq. 14, with the cumulative ratio (erratum 10)."""
    std = eta * np.sqrt((1 - ab_s) / (1 - ab_t)) * np.sqrt(1 - ab_t / ab_s)
    return np.sqrt(ab_s), np.sqrt(max(1 - ab_s - std**2, 0.0)), std


def posterior(ab_t: float, ab_s: float, large: bool) -> tuple[float, float, float]:
    """(c_x0, c_xt, S) of the DDPM posterior step  c_x0 x0_hat + c_xt x_t + S z  (handbook Eq. 8-10)."""
    al = ab_t / ab_s
    var = (1 - al) if large else (1 - al) * (1 - ab_s) / (1 - ab_t)
    c_x0 = np.sqrt(ab_s) * (1 - al) / (1 - ab_t)
    return c_x0, np.sqrt(al) * (1 - ab_s) / (1 - ab_t), (np.sqrt(var) if ab_s < 1 else 0.0)


def ddpm(ab_t: float, ab_s: float, large: bool = False) -> tuple[float, float, float]:
    """(A, B, S): ``posterior`` with x_t = a x0_hat + b eps_hat put in."""
    c_x0, c_xt, std = posterior(ab_t, ab_s, large)
    return c_x0 + c_xt * np.sqrt(ab_t), c_xt * np.sqrt(1 - ab_t), std


# Eq. (3): laws of samplers


def gaussian_step(m: float, lam: float, step: Step) -> tuple[float, float, float]:
    """(slope, intercept, std) of a step with the exact denoiser of N(m, lam)."""
    a, b, A, B, std = step
    slope = (A * a * lam + B * b) / (a**2 * lam + b**2)
    return slope, A * m - slope * a * m, std


def gaussian_law(m: float, lam: float, steps: list[Step], start: tuple[float, float]) -> tuple[float, float]:
    """(mean, variance) after all steps, begun from (mean, variance) ``start``."""
    mean, var = start
    for step in steps:
        slope, shift, std = gaussian_step(m, lam, step)
        mean, var = slope * mean + shift, slope**2 * var + std**2
    return mean, var


def mixture_law(law: Mixture, steps: list[Step], start_std: float, nodes: int = 1500) -> Callable[[Array], Array]:
    """The CDF of a 1-D sampler with the exact denoiser: quadrature of Chapman-Kolmogorov from N(0, start_std^2).

    The law is held as its CDF F at nodes x_i. A noisy step is F_s(y) = sum_i Phi((y - mu(x_i)) / S) dF_i; a noise-free
    one moves the nodes, mu being monotone.
    """
    x = np.linspace(-7, 7, nodes) * max(start_std, 1.0)
    F = ndtr(x / start_std)
    for a, b, A, B, std in steps:
        mid = (x[1:] + x[:-1])[:, None] / 2
        if std > 0:
            mu = A * law.x0(mid, a, b) + B * law.eps(mid, a, b)
            reach = 8 * std
            y = np.linspace(mu.min() - reach, mu.max() + reach, nodes)
            F = ndtr((y[:, None] - mu[None, :, 0]) / std) @ np.diff(F)
            x = y
        else:
            x = (A * law.x0(x[:, None], a, b) + B * law.eps(x[:, None], a, b))[:, 0]
    return lambda q: np.interp(q, x, F, left=0.0, right=1.0)


@dataclass(frozen=True)
class LinearGaussianChain:
    """x_{k+1} = (p_k + q_k theta_0) x_k + q_k theta_1 + S_k z,  x_0 ~ N(0, std0^2),  R = -kappa |x_K - r|^2 / 2.

    A network y = theta_0 x + theta_1 of any kind gives such a chain. Means and variances follow

        m' = c m + q theta_1,   V' = c^2 V + S^2,   c = p + q theta_0;       J = -kappa/2 sum_d [(m_d - r_d)^2 + V]

    and so do their derivatives. What a policy gradient sees is the part that enters at the noisy steps (S > 0); the
    pathwise rest enters at the others. (theta, r: the same theta_1 acts in every dimension; r is (d,).)
    """

    p: Array
    q: Array
    std: Array
    std0: float
    kappa: float
    r: Array

    @property
    def noisy(self) -> Array:
        return self.std > 0

    def cut(self, steps: int, *more: tuple[float, float, float]) -> "LinearGaussianChain":
        """The first ``steps`` steps, then others (p, q, S): what a learner does from there instead."""
        p, q, std = np.array(more).reshape(-1, 3).T
        columns = zip((self.p, self.q, self.std), (p, q, std))
        return replace(self, **dict(zip(("p", "q", "std"), (np.append(a[:steps], b) for a, b in columns))))

    def value(self, theta: Array) -> float:
        """J(theta)."""
        return self._reward(*self.law(np.tile(theta, (len(self.p), 1))))

    def law(self, acting: Array) -> tuple[float, float]:
        """Mean and variance of x_K, each dimension's, for parameters ``acting`` (K, 2), one row a step."""
        m, v = 0.0, self.std0**2
        for (t0, t1), p, q, s in zip(acting, self.p, self.q, self.std):
            c = p + q * t0
            m, v = c * m + q * t1, c**2 * v + s**2
        return m, v

    def _reward(self, m: float, v: float) -> float:
        return float(-self.kappa / 2 * (((m - self.r) ** 2).sum() + len(self.r) * v))

    def gradient(self, theta: Array, enters: Array, old: Array | None = None) -> Array:
        """dJ/dtheta through the steps of the mask ``enters`` (K,).

        With ``old``: theta acts at ONE entering step at a time, ``old`` at all others, and the derivatives are summed:
        the expectation of the per-step importance-weighted estimator on walks of ``old``.
        """
        if old is None:
            return self._derivative(np.tile(theta, (len(self.p), 1)), enters)
        total = np.zeros(2)
        for k in np.flatnonzero(enters):
            acting = np.tile(old, (len(self.p), 1))
            acting[k] = theta
            total += self._derivative(acting, np.arange(len(self.p)) == k)
        return total

    def _derivative(self, acting: Array, enters: Array) -> Array:
        """d J / d theta for parameters ``acting`` (K, 2), of which only the entering ones are theta."""
        m, v, dm, dv = 0.0, self.std0**2, np.zeros(2), np.zeros(2)
        for (t0, t1), p, q, s, on in zip(acting, self.p, self.q, self.std, enters):
            c = p + q * t0
            dm, dv = c * dm + on * q * np.array([m, 1.0]), c**2 * dv + on * np.array([2 * c * q * v, 0.0])
            m, v = c * m + q * t1, c**2 * v + s**2
        return -self.kappa * ((m - self.r).sum() * dm + len(self.r) * dv / 2)
