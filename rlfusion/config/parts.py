"""The settings that several commands share."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import LONGEST_PATH, ConfigError, require_not_negative, require_positive, shorten
from rlfusion.evaluation.metrics import require_metrics
from rlfusion.rollout import Limits, Settings
from rlfusion.rollout.placement import Role, require_gpus, require_resources
from rlfusion.rollout.together import Placing
from rlfusion.training.optimizers import require_elementwise

SPLIT_ON = ("auto", "cpu", "cuda")
"""The devices of ranks whose networks are split."""


def require_output(name: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written, before there is anything to write.

    Raises:
        ConfigError: another suffix, a folder, or a place where nothing can be made.
    """
    file = Path(path)
    what = f"{name} = {shorten(repr(path), LONGEST_PATH)}"
    if file.suffix.lower() not in suffixes:
        raise ConfigError(f"{what}: expected a file that ends in {' or '.join(suffixes)}")
    try:
        if file.is_dir():
            raise ConfigError(f"{what}: this is a folder, expected a file")
        above = next(folder for folder in file.absolute().parents if folder.exists())
    except OSError as error:
        raise ConfigError(f"{what}: {shorten(error.strerror)}") from error
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{what}: nothing can be written in {shorten(repr(str(above)), LONGEST_PATH)}")


@dataclass(frozen=True)
class Rollout:
    """The number of walks of a rollout, and of workers that collect them.

    Attributes:
        prompts: distinct prompts (classes) of a rollout.
        samples_per_prompt: walks of each.
        item: walks of one work item; a work item is what one worker does at a time.
        workers: Ray actors that collect; 0 collects in this process, without Ray.
        lag: rollouts that may be collected ahead of the weights; each walk then has weights up to ``lag`` updates old.
        overlap: without workers, a thread decodes and scores the walks of an item while the next one is walked: for
            rewards that wait or compute elsewhere. Same bits; memory for both at once.
    """

    prompts: int = 10
    samples_per_prompt: int = 24
    item: int = 120
    workers: int = 0
    lag: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "prompts", "samples_per_prompt", "item")
        require_not_negative(self, "workers", "lag")
        if self.overlap and self.workers:
            raise ConfigError(
                f"rollout.overlap = True with rollout.workers = {self.workers}: each worker scores while others walk, "
                "expected false, or 0 workers"
            )


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster of the processes that learn, where ``learner.ranks`` is not 0.

    Attributes:
        address: of a running Ray cluster, host:port, ray://host:port or auto; empty starts a private one on this
            machine, on its loopback alone.
        connect_timeout_s: within which the cluster at ``address``, and a worker of it, must answer before any work.
        start_timeout_s: for which the processes of a private cluster are waited for, each; it is tried twice.
        wait_s: for which processes that have no place are waited for, before any work: an autoscaler of the cluster is
            asked for them. 0 refuses at once.
    """

    address: str = ""
    connect_timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        require_not_negative(self, "wait_s")

    def alone(self, threads: int) -> Settings:
        """The cluster's settings, without workers.

        Raises:
            ConfigError: values that no cluster can have.
        """
        times = {"connect_timeout_s": self.connect_timeout_s, "start_timeout_s": self.start_timeout_s}
        return Settings(threads=threads, address=self.address, wait_s=self.wait_s, **times)


@dataclass(frozen=True)
class Nodes:
    """The Ray cluster on whose nodes the runs of a comparison are placed, where there is an address.

    Attributes:
        address: of a running Ray cluster, host:port, ray://host:port or auto; empty does the runs on this machine.
        connect_timeout_s: within which the cluster, and a worker of it, must answer before any work.
        wait_s: for which a place for one run is waited for, before any work: an autoscaler of the cluster is asked for
            it. 0 refuses at once.
        cpus_per_run: CPU cores that each run reserves; 0 for as many as ``threads``, and one for each of its rollout
            workers.
        gpus_per_run: GPUs, or a fraction of one, that each run reserves. With 0 it works on the CPU.
        resources_per_run: Ray's custom resources that each run reserves, of nodes of the cluster, by name.
    """

    address: str = ""
    connect_timeout_s: float = 60.0
    wait_s: float = 0.0
    cpus_per_run: float = 0.0
    gpus_per_run: float = 0.0
    resources_per_run: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_not_negative(self, "wait_s", "cpus_per_run", "gpus_per_run")
        require_gpus("ray.gpus_per_run", self.gpus_per_run)
        require_resources("ray.resources_per_run", self.resources_per_run)
        self.settings(1)
        told = {"wait_s": 0.0, "cpus_per_run": 0.0, "gpus_per_run": 0.0, "resources_per_run": {}}
        for name, usual in told.items():
            if not self.address and getattr(self, name) != usual:
                raise ConfigError(f"ray.{name} = {getattr(self, name)}: expected ray.address, of the cluster, with it")

    def settings(self, threads: int) -> Settings:
        """The cluster's settings, without workers.

        Raises:
            ConfigError: values that no cluster can have.
        """
        told = {"address": self.address, "connect_timeout_s": self.connect_timeout_s}
        return Settings(threads=threads, wait_s=self.wait_s, **told)

    def role(self, threads: int, workers: int) -> Role:
        """What one run reserves."""
        cpus = self.cpus_per_run or float(threads + workers)
        return Role("runs", 1, cpus, self.gpus_per_run, self.resources_per_run, threads=threads)


@dataclass(frozen=True)
class Ray(Cluster):
    """Settings of the Ray workers, where ``rollout.workers`` is not 0.

    Attributes:
        address: of a running Ray cluster, host:port, ray://host:port or auto; empty starts a private one on this
            machine, on its loopback alone.
        connect_timeout_s: within which the cluster at ``address``, and a worker of it, must answer before any work.
        start_timeout_s: for which the processes of a private cluster are waited for, each; it is tried twice.
        wait_s: for which processes that have no place are waited for, before any work: an autoscaler of the cluster is
            asked for them. 0 refuses at once.
        cpus_per_worker: CPU cores that each worker reserves.
        gpus_per_worker: GPUs, or a fraction of one, that each worker reserves. With one it works on that, else on the
            CPU, whatever the device of the learner.
        resources_per_worker: Ray's custom resources that each worker reserves, of nodes of a cluster, by name.
        threads_per_worker: CPU threads of torch of each worker; 0 for as many as ``threads`` of the run.
        limits: deadlines and retries.
        reward_envs: rewards that run in actors with a runtime environment of their own, by name: what Ray calls
            runtime_env, such as {pip: [...]}, {working_dir: ...}, {env_vars: {...}}; {} for that of the run.
        workers_per_reward: actors of each of those; whoever asks for rewards asks them in turn.
        threads_per_reward: CPU threads of torch of each of those; 0 for as many as ``threads`` of the run.
        cpus_per_reward: CPU cores that each of those reserves.
        gpus_per_reward: GPUs, or a fraction of one, that each of those reserves.
        resources_per_reward: Ray's custom resources that each of those reserves.
        placement: of workers and learner ranks: any: wherever there is room; colocated: each rank and its part of the
            workers on one node, and where they are shares of a GPU on the same one; apart: no worker is on a node that
            a rank is on.
    """

    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    threads_per_worker: int = 0
    limits: Limits = field(default_factory=Limits)
    reward_envs: dict[str, dict[str, Any]] = field(default_factory=dict)
    workers_per_reward: int = 1
    threads_per_reward: int = 0
    cpus_per_reward: float = 0.0
    gpus_per_reward: float = 0.0
    resources_per_reward: dict[str, float] = field(default_factory=dict)
    placement: Placing = "any"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "workers_per_reward")
        require_not_negative(self, "threads_per_worker", "threads_per_reward", "cpus_per_reward", "gpus_per_reward")
        require_gpus("ray.gpus_per_worker", self.gpus_per_worker)
        require_gpus("ray.gpus_per_reward", self.gpus_per_reward)
        for name in ("resources_per_worker", "resources_per_reward"):
            require_resources(f"ray.{name}", getattr(self, name))

    def settings(self, workers: int, threads: int, device: str) -> Settings:
        """The backend's settings for so many workers.

        Raises:
            ConfigError: values that no backend can use.
        """
        if workers and device.startswith("cuda") and not self.gpus_per_worker:
            raise ConfigError(f"gpus_per_worker = 0 with device = {device}: expected a share of a GPU above 0")
        return Settings(
            workers,
            self.cpus_per_worker,
            self.gpus_per_worker,
            (workers and self.threads_per_worker) or threads,
            self.address,
            self.limits,
            self.connect_timeout_s,
            self.start_timeout_s,
            self.resources_per_worker,
            Role(
                "reward workers",
                len(self.reward_envs) * self.workers_per_reward,
                self.cpus_per_reward,
                self.gpus_per_reward,
                self.resources_per_reward,
                threads=self.threads_per_reward or threads,
            ),
            self.wait_s,
            self.placement,
        )


@dataclass(frozen=True)
class Learners:
    """The processes that learn together, from the same rollouts or batches.

    Attributes:
        ranks: Ray actors that learn; 0 learns in this process, without Ray.
        shares: the parts into which a rollout, or a batch of supervised training, is cut, a multiple of ``ranks``; each
            optimiser step takes samples of every share. Equal shares on other ranks are the same run, to rounding.
        exact: gradients are summed over the shares in one fixed tree, so that any number of ranks gives the same bits
            where shares / ranks is a power of two.
        shard: "none": each rank holds the whole network; "fsdp": each holds its rows of the parameters, gradients,
            moments and averages (FSDP2 of torch), and layers are gathered while they compute.
        cpus_per_rank: CPU cores that each rank reserves.
        gpus_per_rank: GPUs that each rank reserves, or above half of one. No two ranks share a GPU.
        resources_per_rank: Ray's custom resources that each rank reserves, of nodes of a cluster, by name.
        restarts: times that ranks which were lost are begun anew, from the newest checkpoint.
        timeout_s: for which a rank may not answer, or not join in what all do together, before it is lost.
    """

    ranks: int = 0
    shares: int = 1
    exact: bool = False
    shard: Literal["none", "fsdp"] = "none"
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    resources_per_rank: dict[str, float] = field(default_factory=dict)
    restarts: int = 3
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require_not_negative(self, "ranks", "cpus_per_rank", "gpus_per_rank", "restarts")
        require_gpus("learner.gpus_per_rank", self.gpus_per_rank)
        require_resources("learner.resources_per_rank", self.resources_per_rank)
        if self.ranks > 1 and 0 < self.gpus_per_rank <= 0.5:
            raise ConfigError(
                f"learner.gpus_per_rank = {self.gpus_per_rank:g} with learner.ranks = {self.ranks}: expected whole "
                "GPUs, or a share above 0.5, as no two ranks share one"
            )
        require_positive(self, "shares", "timeout_s")
        count = max(1, self.ranks)
        if self.shares % count:
            raise ConfigError(
                f"learner.shares = {self.shares}: expected a multiple of learner.ranks = {self.ranks}, such as {count}"
            )
        if self.split and not self.ranks:
            raise ConfigError("learner.ranks = 0 with learner.shard = fsdp: expected ranks, 1 at least")
        if self.split and self.exact and count & (count - 1):
            raise ConfigError(
                f"learner.exact = true with learner.shard = fsdp, learner.ranks = {count}: expected a power of two"
            )
        each = self.shares // count
        if self.exact and each & (each - 1):
            raise ConfigError(
                f"learner.exact = true with learner.shares = {self.shares}, learner.ranks = {self.ranks}: expected "
                f"shares / ranks to be a power of two, is {each}"
            )

    def role(self, threads: int) -> Role:
        """The ranks as processes of a cluster."""
        each = (self.cpus_per_rank, self.gpus_per_rank, self.resources_per_rank)
        return Role("learner ranks", self.ranks, *each, alone=True, threads=threads)

    def require_device(self, device: str) -> None:
        """Raise ConfigError where ranks are to learn on GPUs, and none is reserved for them."""
        if self.ranks and device.startswith("cuda") and not self.gpus_per_rank:
            raise ConfigError(f"learner.gpus_per_rank = 0 with device = {device}: expected 1, or a share of a GPU")

    def require_splittable(self, device: str, optimizer: str) -> None:
        """Raise ConfigError where ranks are to split a network, and cannot on this device or by this optimiser."""
        if not self.split:
            return
        require_elementwise(optimizer)
        if device not in SPLIT_ON:
            raise ConfigError(
                f"device = {device} with learner.shard = fsdp: expected one of {', '.join(SPLIT_ON)}; each rank has "
                "the GPUs that learner.gpus_per_rank gives it"
            )

    def require_batch(self, name: str, batch: int) -> None:
        """Raise ConfigError where a batch, the setting ``name``, has fewer samples than there are shares."""
        if batch < self.shares:
            raise ConfigError(f"{name} = {batch}: expected a sample at least in each of learner.shares = {self.shares}")

    @property
    def split(self) -> bool:
        """Whether parameters lie in shards over the ranks."""
        return self.shard == "fsdp"


@dataclass(frozen=True)
class Figures:
    """Settings of the figures of a model, from one sample on: those that so many cannot carry are left out.

    Attributes:
        samples: how many; the classes take turns.
        bits_per_dim: also bound the likelihood of the held-out data under the chain (``evaluation.likelihood``), which
            needs data of known grey levels and a kernel such as DDIM(eta=1.0) or DDPM().
        metrics: further figures of the samples, by name: contrast, saturation, sharpness, or your own, as
            my_metrics.py:name (docs/doors.md).
    """

    FEWEST: ClassVar[int] = 1
    samples: int = 1000
    bits_per_dim: bool = False
    metrics: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", [absolute(text) for text in self.metrics])
        require_metrics(self.metrics)
        if self.samples < self.FEWEST:
            raise ConfigError(f"samples = {self.samples}: expected at least {self.FEWEST}")


@dataclass(frozen=True)
class Evaluation(Figures):
    """Settings of the evaluation of a model that was trained, on fixed seeds.

    Attributes:
        samples: how many, 50 at least; the classes take turns.
        bits_per_dim: also bound the likelihood of the held-out data under the chain (``evaluation.likelihood``), which
            needs data of known grey levels and a kernel such as DDIM(eta=1.0) or DDPM().
        metrics: further figures of the samples, by name: contrast, saturation, sharpness, or your own, as
            my_metrics.py:name (docs/doors.md).
    """

    FEWEST: ClassVar[int] = 50


@dataclass(frozen=True)
class Evaluations(Evaluation):
    """Settings of the evaluations of a fine-tuning on fixed seeds, before and after, and on its way.

    Attributes:
        samples: how many, 50 at least; the classes take turns.
        bits_per_dim: also bound the likelihood of the held-out data under the chain (``evaluation.likelihood``), which
            needs data of known grey levels and a kernel such as DDIM(eta=1.0) or DDPM().
        metrics: further figures of the samples, by name: contrast, saturation, sharpness, or your own, as
            my_metrics.py:name (docs/doors.md).
        every: also evaluate each time that many updates are done; 0 evaluates before and after only. "auto" does so a
            few times, on so many of the samples that all of these together are no more than a tenth of the walks of
            the rollouts: of a short run never.
        deterministic: also log reward, agreement and Frechet distance under DDIM(eta=0), which many will sample with.
    """

    every: int | Literal["auto"] = "auto"
    deterministic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every != "auto" and self.every < 0:
            raise ConfigError(f"every = {self.every}: expected a number >= 0, or auto")
