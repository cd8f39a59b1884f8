"""GenEval-style object checks: Mask2Former finds the objects, a CLIP tells their colours, ``rules`` say what is met."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.rewards.base import require_labels
from rlfusion.rewards.kit.calling import package, pictures
from rlfusion.rewards.kit.object_checks.rules import SURE, Found, met, require_rules
from rlfusion.training.devices import pick_device

KIT = "object_checks"
AS_GENEVAL = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""COCO's names of classes, and what GenEval calls them."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
WORDS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99


class ObjectChecks:
    """1 for an image that meets all of its prompt's rules, else 0; not ``strict``, the share of them that it meets."""

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "ViT-L-14",
        clip_weights: str = "openai",
        strict: bool = True,
        device: str = "auto",
        *,
        metadata: Sequence[Mapping[str, Any]],
    ) -> None:
        """``model`` finds objects; ``clip``, of open_clip, tells colours where a rule asks for one.

        Raises:
            ConfigError: a prompt without such rules, or with a class or a colour that is not known.
        """
        self.strict, self.device, self.rows = strict, pick_device(device), metadata
        theirs = package("transformers", KIT)
        self.processor = theirs.AutoImageProcessor.from_pretrained(model)
        self.model = theirs.Mask2FormerForUniversalSegmentation.from_pretrained(model).to(self.device).eval()
        coco = self.model.config.id2label
        self.names = {number: AS_GENEVAL.get(name, name) for number, name in coco.items()}
        for row in metadata:
            require_rules(row, list(self.names.values()))
        asked = {one["color"] for row in metadata for one in row["include"] if "color" in one}
        if wrong := sorted(asked - set(COLORS)):
            raise ConfigError(f"object_checks: color {wrong[0]!r}: expected one of {', '.join(COLORS)}")
        self.colors = _Colors(clip, clip_weights, str(self.device)) if asked else None

    @torch.no_grad()
    def __call__(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) -> (B,)."""
        rows = require_labels(cond, len(samples), len(self.rows), KIT).tolist()
        images = pictures(samples, KIT)
        return torch.tensor([self._one(self.rows[row], image) for row, image in zip(rows, images)])

    def _one(self, row: Mapping[str, Any], image: Any) -> float:
        said = met(row, self._objects(image), lambda some, name: self.colors.of(image, some, name))
        return float(all(said)) if self.strict else sum(said) / len(said)

    def _objects(self, image: Any) -> dict[str, list[Found]]:
        """The objects of each class in an image."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        answer = self.processor.post_process_instance_segmentation(
            self.model(**inputs), threshold=SURE, target_sizes=[image.size[::-1]], return_binary_maps=True
        )[0]
        found: dict[str, list[Found]] = {}
        for about, mask in zip(answer["segments_info"], answer["segmentation"]):
            at = mask.bool().nonzero()
            if len(at):
                (y0, x0), (y1, x1) = at.min(0).values.tolist(), (at.max(0).values + 1).tolist()
                one = Found((x0, y0, x1, y1), about["score"], mask.bool().cpu())
                found.setdefault(self.names[about["label_id"]], []).append(one)
        return found


class _Colors:
    """The colours of objects by a CLIP, of each cut out of its image before grey."""

    def __init__(self, model: str, weights: str, device: str) -> None:
        theirs = package("open_clip", KIT)
        held, _, self.prepare = theirs.create_model_and_transforms(model, pretrained=weights, device=device)
        self.model, self.tokens, self.device = held.eval(), theirs.get_tokenizer(model), device
        self.known: dict[str, Tensor] = {}

    def of(self, image: Any, some: Sequence[Found], name: str) -> list[str]:
        """The colour of each of some objects of a class."""
        if name not in self.known:
            words = [word.format(color=color, name=name) for color in COLORS for word in WORDS]
            texts = _unit(self.model.encode_text(self.tokens(words).to(self.device)))
            self.known[name] = _unit(texts.reshape(len(COLORS), len(WORDS), -1).mean(1))
        cut = torch.stack([self.prepare(_cut(image, one)) for one in some]).to(self.device)
        return [COLORS[i] for i in (_unit(self.model.encode_image(cut)) @ self.known[name].T).argmax(1).tolist()]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _cut(image: Any, one: Found) -> Any:
    from PIL import Image

    grey = Image.new("RGB", image.size, (GREY,) * 3)
    mask = Image.fromarray(one.mask.to(torch.uint8).mul(255).numpy())
    return Image.composite(image, grey, mask).crop(tuple(map(int, one.box)))
