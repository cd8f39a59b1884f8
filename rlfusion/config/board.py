"""The settings of ``rlfusion board``."""

from dataclasses import dataclass, field

from rlfusion.common.errors import ConfigError, require_distinct

MOST_PORT = 65535


@dataclass(frozen=True)
class Board:
    """Open TensorBoard on runs, at their gain: rlfusion board runs, or runs/FIRST runs/SECOND.

    Attributes:
        runs: folders of runs, or of folders of runs.
        port: to listen on; 0 takes 6006, or the next that is free.
        host: to listen on. Anybody who reaches another than 127.0.0.1 sees the runs, without a password.
        filter: the scalars to begin with, as a regular expression; empty shows all.
    """

    runs: list[str] = field(default_factory=lambda: ["runs"])
    port: int = 0
    host: str = "127.0.0.1"
    filter: str = "gain|reward$"

    def __post_init__(self) -> None:
        require_distinct("runs", self.runs)
        if not self.runs:
            raise ConfigError("runs = []: expected one folder at least")
        if not 0 <= self.port <= MOST_PORT:
            raise ConfigError(f"port = {self.port}: expected a number from 0 to {MOST_PORT}")
