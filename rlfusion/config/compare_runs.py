"""The settings of ``rlfusion compare RUN...``, of runs that are there."""

from dataclasses import dataclass, field

from rlfusion.common.errors import ConfigError, require_distinct, require_positive


@dataclass(frozen=True)
class CompareRuns:
    """Compare runs that are there, finished or not: tables, plots and report.html of what they have measured so far.

    Attributes:
        runs: folders of finetune, and of compare, which stands for all of its runs; patterns like 'runs/sd-*' are
            followed.
        by: the settings by which runs are told apart, the seed aside: agent, reward, lr, chain.steps, ...; a group such
            as agent stands for its name and for what differs in it, and lr for agent.lr.
        out: the folder to write; empty makes compare-BY beside the first run.
        target: gain, in standard deviations of the base's rewards, whose price in queries and seconds is told.
        quality: the gain at fixed quality is the largest at a Frechet distance up to so many times the base's, where
            there are data to have one from.
    """

    runs: list[str]
    by: list[str] = field(default_factory=lambda: ["agent"])
    out: str = ""
    target: float = 2.0
    quality: float = 3.0

    def __post_init__(self) -> None:
        require_positive(self, "target", "quality")
        for name in ("runs", "by"):
            if not getattr(self, name):
                raise ConfigError(f"{name} = []: expected one at least")
            require_distinct(name, getattr(self, name))
