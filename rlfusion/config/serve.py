"""The settings of ``rlfusion serve-reward``."""

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.rewards.remote.secret import VARIABLE, read_token

MOST_PORT = 65535


@dataclass(frozen=True)
class Serve:
    """Serve a reward over HTTP, for rewards named http://host:port.

    Attributes:
        reward: its name, as of finetune.
        options: its settings.
        host: the address to listen on; others than this machine's loopback need a token.
        port: 0 for any free one; the line that is printed says which.
        token_file: holds the token that clients must show, mode 600; empty takes it from the environment variable
            RLFUSION_REWARD_TOKEN, and if there is none, whoever reaches the port may ask.
        max_mb: MiB of one question.
        max_held_mb: MiB of all questions that are held at once; others wait for their turn, and are not read before.
        deadline_s: to receive a question, and to score it.
        cache: samples whose rewards are remembered, should a batch be asked again; 0 for none.
        idle_s: stop when nobody asked for so long; 0 never does.
        device: "cpu", "cuda", or "auto".
        threads: CPU threads of torch.
    """

    reward: str
    options: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8500
    token_file: str = ""
    max_mb: int = 256
    max_held_mb: int = 1024
    deadline_s: float = 120.0
    cache: int = 0
    idle_s: float = 0.0
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "max_mb", "deadline_s", "threads")
        require_not_negative(self, "cache", "idle_s")
        if not 0 <= self.port <= MOST_PORT:
            raise ConfigError(f"port = {self.port}: expected 0..{MOST_PORT}, 0 for any free one")
        if self.max_held_mb < self.max_mb:
            raise ConfigError(
                f"max_held_mb = {self.max_held_mb}: expected max_mb = {self.max_mb} at least, one question"
            )
        if not (_is_loopback(self.host) or read_token(self.token_file)):
            raise ConfigError(
                f"host = {self.host!r}: others than this machine's loopback need a token, expected token_file or "
                f"the environment variable {VARIABLE}"
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
