"""The settings of ``rlfusion distill``."""

from dataclasses import dataclass, field, make_dataclass
from typing import Literal

from rlfusion import distill
from rlfusion.common import spec
from rlfusion.common.code_files import absolute, label
from rlfusion.common.errors import require_positive
from rlfusion.config.parts import Evaluation, Learners, Ray
from rlfusion.config.pretrain import Base
from rlfusion.diffusion.chain import Chain
from rlfusion.rollout import Settings
from rlfusion.training.checkpoint import NEWEST, Keep
from rlfusion.training.devices import Deterministic
from rlfusion.training.trackers import require_trackers


@dataclass(frozen=True)
class Distill:
    """Teach a model that needs few steps. Without a teacher, one is pretrained first and kept in root/cache.

    Attributes:
        root: folder of all runs, and of what they share (root/cache).
        name: of the run's folder below root; empty makes one from the settings.
        seed: keys every random draw of the distillation.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        threads: CPU threads of torch.
        deterministic: on a GPU, kernels that give the same bits each time; where there is none torch warns, or with
            "strict" it is an error (docs/models.md). false lets the fastest act.
        tf32: on a GPU, products of float32 matrices keep 10 bits of their factors' mantissas, for speed.
        teacher: folder of the model that teaches (a run or its model folder); empty pretrains one as ``pretrain`` says.
        pretrain: how the teacher is made where ``teacher`` is empty, and the data to train on and to compare with.
        guidance: classifier-free guidance weight w with which the teacher answers; the student has it built in.
        student: what the student is, where it is not as its teacher.
        chain: the student's sampler: it is saved with it, and with it the student is sampled and fine-tuned.
        method: the method and its settings.
        workers: Ray workers that make pairs of the teacher, where the method learns from them; 0 makes them here.
        ray: the Ray workers.
        learner: the processes that learn.
        evaluation: the evaluation.
        checkpoint_every: updates between checkpoints.
        checkpoints: those that stay, and how they are written.
        track: trackers beside TensorBoard, as of finetune (docs/tracking.md).
        track_failures: a tracker that fails while the run is at work is told once, and the training goes on ("warn"),
            or ends ("stop").
    """

    root: str = "runs"
    name: str = ""
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    deterministic: Deterministic = True
    tf32: bool = False
    teacher: str = ""
    pretrain: Base = field(default_factory=Base)
    guidance: float = 0.0
    student: distill.Student = field(default_factory=lambda: distill.METHODS["cd"].STUDENT)
    chain: Chain = field(default_factory=lambda: distill.METHODS["cd"].CHAIN)
    method: distill.Method = field(default_factory=lambda: distill.METHODS["cd"]())
    workers: int = 0
    ray: Ray = field(default_factory=Ray)
    learner: Learners = field(default_factory=Learners)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint_every: int = 500
    checkpoints: Keep = field(default_factory=lambda: NEWEST)
    track: list[str] = field(default_factory=list)
    track_failures: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "track", [absolute(text) for text in self.track])
        require_trackers(self.track)
        require_positive(self, "threads", "checkpoint_every")
        self.learner.require_device(self.device)
        self.learner.require_splittable(self.device, getattr(self.method, "optimizer", "adamw"))
        if isinstance(self.method, distill.Settings):
            self.learner.require_batch("method.batch", self.method.batch)
        _ = self.settings  # refuses what no backend can use

    @property
    def settings(self) -> Settings:
        """The settings of the backend that makes pairs."""
        return self.ray.settings(self.workers, self.threads, self.device)

    @property
    def held_out(self) -> float:
        """The share of the data that is kept from training, as of the teacher's."""
        return self.pretrain.held_out

    @property
    def default_name(self) -> str:
        """The name of the run's folder where none is given."""
        return f"distill-{label(self.method.name)}-{self.chain.steps}-seed{self.seed}"


def with_method(name: str) -> type[Distill]:
    """``Distill`` as it is read from the command line: ``method`` has the settings of one method, ``student``
    and ``chain`` are those of its students, unless told otherwise.

    Raises:
        ConfigError: no such method.
    """
    method = spec.lookup(distill.METHODS, name, "method")
    fields_ = [
        ("student", distill.Student, field(default_factory=lambda: method.STUDENT)),
        ("chain", Chain, field(default_factory=lambda: method.CHAIN)),
        ("method", method, field(default_factory=method)),
    ]
    return make_dataclass("Distill", fields_, bases=(Distill,), frozen=True, namespace={"__doc__": Distill.__doc__})
