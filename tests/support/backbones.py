"""A backbone of LPIPS with random weights, in the form of torchvision's file: enough for the distance, and offline."""

from pathlib import Path

import pytest
import torch

NET = "squeeze"  # the other backbones take seconds to make


def random_backbone(folder: Path) -> tuple[Path, torch.nn.Module]:
    """The file, and the distance that the authors' own package makes of these weights; skips where it is missing."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(3)
    theirs = lpips.LPIPS(net=NET, pnet_rand=True, verbose=False)
    file = folder / "backbone.pth"
    torchvision = {"features." + name.partition(".")[2]: w for name, w in theirs.net.state_dict().items()}
    torch.save({**torchvision, "classifier.6.bias": torch.zeros(3)}, file)
    return file, theirs
