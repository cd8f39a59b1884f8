"""Stand-ins for the packages of the reward kits: the published signatures, and scores that tell what was given.

A score is a linear function of the mean brightness of the picture and of the number of letters of its prompt.
"""

import sys
import types
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

PROMPTS = ("a cat", "two green dogs", "a bench")


def light(image) -> float:
    """The mean brightness in [0, 1] of an RGB picture, given as such or by its path."""
    image = Image.open(image) if isinstance(image, str) else image
    assert image.mode == "RGB"
    return float(np.asarray(image, dtype=np.float64).mean() / 255)


def module(name: str, **held) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(held)
    return made


def image_reward():
    class Model:
        def score(self, prompt, image):
            return light(image) + len(prompt)

    def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
        assert (name, device) == ("ImageReward-v1.0", "cpu")
        return Model()

    return {"ImageReward": module("ImageReward", load=load)}


def _hpsv3(swapped: bool):
    def rows(images, prompts):
        return [torch.tensor([light(image) + len(text), 0.5]) for image, text in zip(images, prompts, strict=True)]

    class Older:
        def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
            assert device == "cpu"

        def reward(self, image_paths, prompts):
            return rows(image_paths, prompts)

    class Newer(Older):
        def reward(self, prompts, image_paths):
            return rows(image_paths, prompts)

    return {"hpsv3": module("hpsv3", HPSv3RewardInferencer=Newer if swapped else Older)}


class Moved:
    """What has ``to`` and ``eval``, as models have."""

    def to(self, *_args, **_named):
        return self

    def eval(self):
        return self


class Inputs(dict):
    def to(self, device):
        return self


def unified_reward(answer="Good. Final Score: {:.2f}"):
    class Processor:
        @classmethod
        def from_pretrained(cls, name):
            return cls()

        def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
            picture, words = messages[0]["content"]
            assert (picture["type"], words["type"], tokenize, add_generation_prompt) == ("image", "text", False, True)
            return words["text"]

        def __call__(self, images=None, text=None, return_tensors=None):
            caption = text[0].rpartition("Text Caption: [")[2].removesuffix("]")
            self.said = 1 + light(images[0]) + 0.1 * len(caption)
            return Inputs(input_ids=torch.zeros(1, 5, dtype=torch.int64))

        def batch_decode(self, ids, skip_special_tokens=False):
            assert ids.shape == (1, 2)  # without the question
            return [answer.format(self.said)]

    class Model(Moved):
        @classmethod
        def from_pretrained(cls, name, torch_dtype=None):
            return cls()

        def generate(self, input_ids, max_new_tokens=20, do_sample=True):
            assert not do_sample
            return torch.zeros(1, 7, dtype=torch.int64)

    return {"transformers": module("transformers", AutoProcessor=Processor, AutoModelForImageTextToText=Model)}


def deqa():
    class Model(Moved):
        @classmethod
        def from_pretrained(
            cls, name, revision=None, trust_remote_code=False, attn_implementation="", torch_dtype=None
        ):
            assert trust_remote_code
            return cls()

        def score(self, images, task_="quality", input_="image"):
            return torch.tensor([1 + 4 * light(image) for image in images], dtype=torch.float16)

    return {"transformers": module("transformers", AutoModelForCausalLM=Model)}


def safety():
    class Pipeline:
        def __init__(self, task, model, device):
            assert task == "image-classification"
            self.model = types.SimpleNamespace(config=types.SimpleNamespace(id2label={0: "normal", 1: "nsfw"}))

        def __call__(self, inputs, top_k=5, batch_size=1):
            held = [light(image) for image in inputs]
            return [[{"label": "normal", "score": 1 - p}, {"label": "nsfw", "score": p}][:top_k] for p in held]

    return {"transformers": module("transformers", pipeline=Pipeline)}


def object_checks():
    """A detector that finds a dark bench in the left half of a picture, and where it is bright a clock in the right."""

    class Processor:
        @classmethod
        def from_pretrained(cls, name):
            return cls()

        def __call__(self, images, return_tensors):
            return Inputs(light=light(images))

        def post_process_instance_segmentation(self, outputs, threshold, target_sizes, return_binary_maps):
            ((height, width),) = target_sizes
            masks = torch.zeros(2, height, width)
            masks[0, :, : width // 2], masks[1, :, width // 2 :] = 1, 1
            both = [{"label_id": 13, "score": 0.95}, {"label_id": 74, "score": 0.95}]
            count = 2 if outputs > 0.5 else 1
            return [{"segmentation": masks[:count], "segments_info": both[:count]}]

    class Model(Moved):
        config = types.SimpleNamespace(id2label={13: "bench", 74: "clock", 64: "mouse"})

        @classmethod
        def from_pretrained(cls, name):
            return cls()

        def __call__(self, light):
            return light

    names = {"AutoImageProcessor": Processor, "Mask2FormerForUniversalSegmentation": Model}
    return {"transformers": module("transformers", **names), "open_clip": open_clip()}


def open_clip():
    """A CLIP that knows red from all other colours: by the mean of the picture's channels before grey, and the word."""
    from rlfusion.rewards.kit.object_checks.scorer import COLORS

    class Model(Moved):
        def encode_text(self, tokens):
            return torch.stack(
                [torch.eye(len(COLORS))[next(i for i, c in enumerate(COLORS) if c in t)] for t in tokens]
            )

        def encode_image(self, images):
            red = images[:, 0].flatten(1).mean(1) > images[:, 1].flatten(1).mean(1) + 0.1
            return torch.eye(len(COLORS))[torch.where(red, COLORS.index("red"), COLORS.index("blue"))]

    class Tokens(list):
        def to(self, device):
            return self

    def prepare(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def create_model_and_transforms(model_name, pretrained=None, device="cpu"):
        return Model(), None, prepare

    return module(
        "open_clip", create_model_and_transforms=create_model_and_transforms, get_tokenizer=lambda model_name: Tokens
    )


def lpips():
    class LPIPS(torch.nn.Module):
        def __init__(self, pretrained=True, net="alex", version="0.1", lpips=True, pnet_rand=False, verbose=True):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, in0, in1, retPerLayer=False, normalize=False):
            return (in0 - in1).abs().mean((1, 2, 3), keepdim=True) / 2 * self.weight

    return {"lpips": module("lpips", LPIPS=LPIPS)}


PACKAGES = {
    "image_reward": image_reward,
    "hpsv3": lambda: _hpsv3(swapped=True),
    "hpsv3, older": lambda: _hpsv3(swapped=False),
    "unified_reward": unified_reward,
    "deqa": deqa,
    "object_checks": object_checks,
    "lpips_likeness": lpips,
    "safety": safety,
}
"""The stand-ins of each kit."""


@contextmanager
def installed(modules):
    """Within the context these modules are the ones that are imported."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                del sys.modules[name]
            else:
                sys.modules[name] = was
