"""The user's settings of a pretrained pipeline, and the part of them that a model card keeps."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.models.pipelines import adapters, brought, hub
from rlfusion.models.pipelines.family import SEQUENCE, plain_grid
from rlfusion.models.pipelines.prompt_files import READERS
from rlfusion.models.pipelines.prompts import Prompts, read
from rlfusion.models.pipelines.quantized import How
from rlfusion.models.pipelines.scheduler import read as read_scheduler

STEPS = "num_inference_steps"
"""The parameter of a pipeline's call whose default the steps of ``Chain`` have."""
MOST_STEPS = 20
"""Steps of a chain that is trained, unless told otherwise or the pipeline's own are fewer."""

UNTOLD: dict[str, Any] = {"dtype": "float32", "vae_dtype": "float32", "checkpointing": False, "decode": 8}
"""What settings that are null stand for, where no saved pipeline has others."""


@dataclass(frozen=True)
class Settings:
    """Settings of a pretrained text-to-image pipeline; other models take none of them.

    Attributes:
        prompts: one prompt, or a file of them: .txt, .csv, .tsv, .json, .jsonl, .parquet (docs/inputs.md).
        prompt_column: of a table, the column of the prompts; empty finds it by its usual names.
        encoding: of the file; empty for UTF-8, or UTF-16 or UTF-32 where its first bytes say so.
        prompts_sha256: digest of the prompts that are expected, which a run writes down; empty expects none.
        size: side of the images in pixels; 0 for the pipeline's own.
        max_sequence_length: tokens of a prompt that the large text encoder reads, padding among them (FLUX, SD3, Sana);
            0 for what the model card has: 256 of FLUX schnell, else the default of diffusers.
        dtype: of the network's frozen weights and arithmetic; latents, transitions, log-probabilities and adapters stay
            in float32. All but float32 needs adapters (lora). Null for what a saved pipeline has, else float32.
        vae_dtype: in which the autoencoder decodes: on a GPU bfloat16 takes a sixth of float32's time. Null for what
            a saved pipeline has, else float32.
        variant: of the weights' files, such as fp16.
        checkpointing: compute activations again in the backward pass, block by block, for less memory; those of the
            autoencoder too, where it can. Null for what a saved pipeline has, else false.
        attention: the back end of diffusers that computes the network's attention ("native", "flash", "_native_flash",
            ...), of networks whose attention diffusers dispatches (FLUX); null for what a saved pipeline has, else
            diffusers' own choice.
        quantize: round the frozen weights of the network's linear layers, once adapters are merged, for less memory
            under trained adapters (lora): "nf4" (bitsandbytes, 4.5 bits a weight), "int8" (bitsandbytes; inputs as
            well) or "torchao_int8" (torchao), 8 bits each. What is saved are adapters for the weights as they were.
        decode: samples that the autoencoder decodes at a time; null for what a saved pipeline has, else 8.
        adapters: files of LoRA that are merged into the weights, FILE.safetensors[:STRENGTH],... in the layout of
            diffusers, peft or kohya, or folders of them; --adapters is the same (docs/models.md). To train one on, give
            it as lora.
        adapters_sha256: digest of the adapters that are expected, which a run writes down; empty expects none.
        scheduler: of diffusers, in the place of the pipeline's own, as LCMScheduler or Name(setting=...); "own" for
            its own. Empty is its own too, unless adapters for few steps bring another (LCM, TCD, Hyper, Turbo).
        family: how prompts are encoded and the network is called, as package.module:Name or path/to/file.py:Name, of a
            family of your own (docs/doors.md); empty finds it by the pipeline's class.
    """

    prompts: str = ""
    prompt_column: str = ""
    encoding: str = ""
    prompts_sha256: str = ""
    size: int = 0
    max_sequence_length: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    variant: str = ""
    checkpointing: bool | None = None
    attention: str | None = None
    quantize: How = "none"
    decode: int | None = None
    adapters: str = ""
    adapters_sha256: str = ""
    scheduler: str = ""
    family: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", absolute(self.family))
        require_not_negative(self, "size", "max_sequence_length")
        if self.decode is not None:
            require_positive(self, "decode")

    def read(self, negative: str = "") -> Prompts:
        """The prompts, which must be those that are expected.

        Raises:
            ConfigError: a file that cannot be read, or was edited.
        """
        prompts = read(self.prompts, negative, self.prompt_column, self.encoding)
        if self.prompts_sha256 and self.prompts_sha256 != (found := self.digest):
            raise ConfigError(
                f"prompts = {self.prompts!r} are others than the run began with (SHA-256 {found[:12]}, "
                f"expected {self.prompts_sha256[:12]}): put the old ones back, or, where the new ones are meant, say "
                "--change pipeline.prompts=... beside --resume; another run has prompts_sha256 empty"
            )
        return prompts

    @property
    def digest(self) -> str:
        """Of what the prompts hold by themselves, whatever the negative prompt of those that have none."""
        return read(self.prompts, "", self.prompt_column, self.encoding).sha256

    def recorded(self) -> "Settings":
        """The same settings as a run writes them down: the file's whole path, and the digest of its prompts."""
        held = self
        if self.adapters:
            found = adapters.parse(self.adapters)
            places = ",".join(f"{one.file}:{one.scale!r}" for one in found)
            held = replace(held, adapters=places, adapters_sha256=_digest(found))
        if not self.prompts:
            return held
        digest, path = self.digest, Path(self.prompts.strip()).expanduser()
        place = str(path.resolve()) if path.suffix.lower() in READERS else self.prompts
        return replace(held, prompts=place, prompts_sha256=digest)

    def merged(self) -> list[dict[str, Any]]:
        """The adapters as a card keeps them, which must be those that are expected.

        Raises:
            ConfigError: a file that is no file of adapters, or is another than the run began with.
        """
        found = adapters.parse(self.adapters)
        if self.adapters_sha256 and self.adapters_sha256 != _digest(found):
            raise ConfigError(
                f"adapters = {self.adapters!r} are others than the run began with: put the old ones back; another run "
                "has adapters_sha256 empty"
            )
        return [one._asdict() for one in found]

    def sequence(self, path: Path) -> dict[str, int]:
        """What a card of the pipeline in ``path`` keeps of ``max_sequence_length``; nothing of one without.

        Raises:
            ConfigError: it has no such setting, or takes no such length.
        """
        known, told, name = hub.family(path, self.family), self.max_sequence_length, hub.pipeline_class(path).__name__
        if known.sequence is None:
            if told:
                raise ConfigError(f"{SEQUENCE} = {told}: {name} has no such setting, expected 0")
            return {}
        own, most = known.sequence(hub.config(path, known.network))
        if told > most:
            raise ConfigError(f"{SEQUENCE} = {told}: expected {most} at most for {name}, or 0 for its own, {own}")
        return {SEQUENCE: told or own}

    def over(self, name: str, held: Mapping[str, Any]) -> dict[str, Any]:
        """What the settings say in place of ``held``, the card of a saved pipeline ``name``: a size, and those that are
        not null; the prompts come beside.

        Raises:
            ConfigError: another family or variant, which a saved one cannot have, or a file's settings without a file.
        """
        for key in ("family", "variant"):
            if (told := getattr(self, key)) not in ("", own := held.get(key, "")):
                raise ConfigError(f"{key} = {told!r}: {name!r} was saved with {key} {own!r}, expected none")
        if not self.prompts and (lone := self.prompt_column or self.encoding):
            raise ConfigError(f"prompt_column or encoding = {lone!r}: expected pipeline.prompts, a file, beside it")
        more = {"adapters": [*held.get("adapters", ()), *self.merged()]} if self.adapters else {}
        more |= self._scheduler(held.get("name", ""), held.get("variant", ""))
        return self._told() | ({"side": self.size} if self.size else {}) | more

    def _scheduler(self, name: str, variant: str, lora: str = "") -> dict[str, Any]:
        """What a card keeps of a scheduler in the place of the pipeline's own; nothing of none."""
        if not (self.scheduler or self.adapters or lora):
            return {}
        held = brought.scheduler(self.scheduler, self.adapters, lora, hub.scheduler(hub.folder(name, variant)))
        return {"scheduler": held} if held or self.scheduler else {}

    def _told(self) -> dict[str, Any]:
        """Those of ``UNTOLD``, and the attention, that are not null; and how weights are rounded, if they are."""
        held = {key: told for key in (*UNTOLD, "attention") if (told := getattr(self, key)) is not None}
        return held if self.quantize == "none" else held | {"quantize": self.quantize}

    def prompted(self, negative: str) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What a card keeps of the prompts beside their texts, and the texts."""
        prompts = self.read(negative)
        return {"negatives": list(prompts.negatives), "metadata": list(prompts.metadata)}, prompts.texts

    def about(self, name: str, negative: str, cache: Path | None) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What a card keeps of the pipeline ``name`` (see ``model``), and the prompts' texts.

        Raises:
            ConfigError: no prompts, or a file of them that cannot be read.
        """
        if not self.prompts:
            raise ConfigError(f"model {name!r} reads texts: expected pipeline.prompts, a prompt or a file of them")
        held, texts = self.prompted(negative)
        place = str(Path(name).resolve()) if Path(name).exists() else name  # a worker, or a later run, has another cwd
        held |= {"name": place, "variant": self.variant, "side": self.size, **UNTOLD, **self._told()}
        held |= {"family": self.family} if self.family else {}
        held |= {"cache": str(cache.resolve()) if cache else "", "adapters": self.merged()}
        return held | self._scheduler(name, self.variant), texts


UNSET = Settings()


def _digest(found: list[adapters.Adapter]) -> str:
    """Of what adapters hold, in their order."""
    return hashlib.sha256("".join(one.sha256 for one in found).encode()).hexdigest()


def brought_scheduler(name: str, settings: Settings, lora: str) -> str:
    """``scheduler`` of the settings of a pipeline: the one that is told, else that which adapters bring."""
    return settings.scheduler or settings._scheduler(name, settings.variant, lora).get("scheduler", "")


def defaults(name: str, training: bool, settings: Settings = UNSET, lora: str = "") -> dict[str, Any]:
    """The chain that a pipeline was published with, or that its adapters bring, as defaults of ``Chain`` by name; for
    ``training``, with noise at every step and no more than ``MOST_STEPS`` of them. ``settings`` name its variant, its
    family, its adapters and its scheduler, ``lora`` the file of adapters that are trained on.

    Raises:
        ConfigError: no such pipeline, one with a scheduler that is not followed, or one that draws no images of texts
            in steps.
    """
    path = hub.folder(name, settings.variant)
    family = hub.family(path, settings.family)
    instead = settings._scheduler(name, settings.variant, lora).get("scheduler", "")
    sampling = read_scheduler(hub.scheduler(path, instead), plain_grid({}, ()))
    own = inspect.signature(hub.pipeline_class(path).__call__).parameters
    if lacking := [name for name in (STEPS, family.scale) if name not in own]:
        raise ConfigError(f"pipeline {name!r}: its call takes no {' and no '.join(lacking)}, expected text to image")
    held = {"steps": own[STEPS].default, "guidance_scale": own[family.scale].default + family.offset}
    if settings.scheduler != brought.OWN:
        held |= brought.chain(settings.adapters, lora, hub.scheduler(path))
    if not (family.guided or family.embeds(hub.config(path, family.network))):
        del held["guidance_scale"]
    kernel = sampling.explore if training else sampling.kernel
    steps = min(held["steps"], MOST_STEPS) if training else held["steps"]
    return {"spacing": "model", **held, "steps": steps, "kernel": kernel}
