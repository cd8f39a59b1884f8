"""What rollouts keep in Ray's object store at once, against what a node has."""

from dataclasses import dataclass

from rlfusion.common.errors import ConfigError
from rlfusion.rollout.rollout_spec import RolloutSpec


@dataclass(frozen=True)
class InFlight:
    """Bytes in the object store of a node while rollouts run.

    Attributes:
        frozen: what every worker builds its task from.
        weights: of one version, and ``versions`` that act at once.
        answer: of one item, and ``workers`` that may each hold one.
    """

    frozen: int
    weights: int
    versions: int
    answer: int
    workers: int

    @property
    def together(self) -> int:
        """All of it."""
        return self.frozen + self.versions * self.weights + self.workers * self.answer

    def require_room(self, there: int) -> None:
        """Refuse rollouts that cannot fit in an object store of ``there`` bytes.

        Raises:
            ConfigError: says what takes how much.
        """
        if self.together <= there:
            return
        raise ConfigError(
            f"rollouts in flight take {_gb(self.together)} of Ray's object store ({self.versions} versions of the "
            f"weights of {_gb(self.weights)}, answers of {self.workers} workers of {_gb(self.answer)}, frozen parts of "
            f"{_gb(self.frozen)}), and a node has {_gb(there)}: expected a smaller rollout.item or rollout.lag, fewer "
            "workers, or ray start --object-store-memory BYTES"
        )


def answer_bytes(walks: int, steps: int, latent: int, spec: RolloutSpec) -> int:
    """Bytes of the answer to an item of so many walks of ``steps`` steps of ``latent`` numbers, conditions aside."""
    states = steps + 1 if spec.path else 1
    return 4 * walks * (states * latent + (steps if spec.path else 0) + 4)


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
