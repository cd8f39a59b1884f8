"""UnifiedReward (Wang et al. 2025): a vision-language model that writes its score, by ``transformers``."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from rlfusion.rewards.base import RewardFailure, require_labels
from rlfusion.rewards.kit.calling import package, pictures, texts
from rlfusion.training.devices import pick_device

KIT = "unified_reward"
LOWEST, HIGHEST = 1.0, 5.0
ANSWER = re.compile(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)")
QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided "
    "caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the "
    "caption.\n2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 "
    "to 5 after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)
"""The question for one score of the authors' inference code."""


class UnifiedReward:
    """(score - 1) / 4 of each image for its prompt."""

    def __init__(
        self,
        model: str = "CodeGoat24/UnifiedReward-qwen-7b",
        device: str = "auto",
        most_words: int = 512,
        *,
        prompts: Sequence[str],
    ) -> None:
        """``most_words`` bounds an answer, in tokens."""
        theirs = package("transformers", KIT)
        self.prompts, self.device, self.most = prompts, pick_device(device), most_words
        self.processor = theirs.AutoProcessor.from_pretrained(model)
        held = theirs.AutoModelForImageTextToText.from_pretrained(model, torch_dtype="auto")
        self.model = held.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) -> (B,).

        Raises:
            RewardFailure: answers without a score from 1 to 5; the others' are good.
        """
        words = texts(self.prompts, require_labels(cond, len(samples), len(self.prompts), KIT))
        answers = [self._answer(image, text) for image, text in zip(pictures(samples, KIT), words)]
        found = torch.tensor([score(answer) for answer in answers])
        if wrong := found.isnan().nonzero().flatten().tolist():
            reasons = {i: f"no score from 1 to 5 in {answers[i][-80:]!r}" for i in wrong}
            raise RewardFailure(KIT, found, reasons)
        return found

    def _answer(self, image: object, prompt: str) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION.format(prompt=prompt)}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=[image], return_tensors="pt").to(self.device)
        made = self.model.generate(**inputs, max_new_tokens=self.most, do_sample=False)
        return self.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def score(answer: str) -> float:
    """The last score of an answer in [0, 1]; NaN where there is none from 1 to 5."""
    found = ANSWER.findall(answer)
    value = float(found[-1]) if found else math.nan
    return (value - LOWEST) / (HIGHEST - LOWEST) if LOWEST <= value <= HIGHEST else math.nan
