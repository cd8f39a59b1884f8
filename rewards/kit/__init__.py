"""Rewards whose packages want an environment of their own: what each needs, and how it is called there.

A kit is a folder: ``requirements.txt`` with pinned versions, ``scorer.py`` with the reward, and here what is said of
it. ``rlfusion rewards install NAME`` makes its environment, and ``rlfusion rewards serve NAME`` serves it by the
protocol of ``serve-reward``. A scorer imports its package when it is made. It calls it by the names of its parameters,
as their order differs between versions.
"""

from dataclasses import dataclass
from importlib.resources import files

from rlfusion.common.errors import unknown


@dataclass(frozen=True)
class Kit:
    """What is said of one.

    Attributes:
        name: of its folder.
        scorer: the class in ``scorer.py``.
        gives: what the reward is.
        interface: what of the package is called.
        licence: of the package and of the weights, as their authors state them.
        weights: what is downloaded, by the package itself, when the scorer is made; "" for nothing.
        device: what it takes.
    """

    name: str
    scorer: str
    gives: str
    interface: str
    licence: str
    weights: str
    device: str = "cuda"

    @property
    def reward(self) -> str:
        """The name of the reward, as of ``serve-reward``."""
        return f"rlfusion.rewards.kit.{self.name}.scorer:{self.scorer}"

    @property
    def requirements(self) -> str:
        """The text of its ``requirements.txt``."""
        return (files("rlfusion.rewards.kit") / self.name / "requirements.txt").read_text()


_ALL = (
    Kit(
        "image_reward",
        "ImageReward",
        "ImageReward of image and prompt (Xu et al. 2023), about -2 to 2",
        "ImageReward.load(name, device).score(prompt, image)",
        "Apache-2.0 (package and weights)",
        "ImageReward-v1.0, 1.8 GB",
    ),
    Kit(
        "hpsv3",
        "HPSv3",
        "HPSv3 (Ma et al. 2025): the mean of the predicted preference",
        "hpsv3.HPSv3RewardInferencer(device).reward(prompts, image_paths)",
        "MIT (package and weights); Qwen2-VL: Apache-2.0",
        "MizzenAI/HPSv3, 16 GB",
    ),
    Kit(
        "unified_reward",
        "UnifiedReward",
        "UnifiedReward's score of alignment and quality (Wang et al. 2025), brought from 1..5 to 0..1",
        "transformers' AutoProcessor and AutoModelForImageTextToText",
        "MIT (weights); Qwen2.5-VL: Apache-2.0",
        "CodeGoat24/UnifiedReward-qwen-7b, 16 GB",
    ),
    Kit(
        "deqa",
        "DeQA",
        "DeQA-Score of technical quality (You et al. 2025), brought from 1..5 to 0..1; it reads no prompt",
        "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True).score(images)",
        "MIT (code and weights); LLaMA 2: its community licence. Code of the weights' repository is run",
        "zhiyuanyou/DeQA-Score-Mix3, 16 GB",
    ),
    Kit(
        "object_checks",
        "ObjectChecks",
        "1 where all objects of GenEval's metadata are there (Ghosh et al. 2023), or the share that is",
        "transformers' Mask2Former, and open_clip for colours",
        "MIT (GenEval's rules; Mask2Former's and open_clip's code); COCO's terms",
        "facebook/mask2former-swin-small-coco-instance, 0.3 GB; openai ViT-L-14, 0.9 GB where colours are asked",
    ),
    Kit(
        "lpips_likeness",
        "LpipsLikeness",
        "minus the LPIPS distance (Zhang et al. 2018) to a reference image of each prompt",
        "lpips.LPIPS(net)(in0, in1)",
        "BSD-2-Clause (package with its linear weights); torchvision: BSD-3-Clause",
        "torchvision's backbone, 5 MB (squeeze) to 0.5 GB (vgg); or a file that is named",
        "cpu",
    ),
    Kit(
        "safety",
        "Safety",
        "minus the probability that an image is not safe for work, 0 below a threshold",
        'transformers\' pipeline("image-classification")(images)',
        "Apache-2.0 (package and weights)",
        "Falconsai/nsfw_image_detection, 0.3 GB",
    ),
)
KITS = {kit.name: kit for kit in _ALL}


def find(name: str) -> Kit:
    """The kit of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KITS:
        raise unknown("kit of rewards", name, KITS)
    return KITS[name]
