"""Libraries say nothing of their own where a pipeline is opened, or adapters are attached."""

import subprocess
import sys

import pytest

OPENED = "from rlfusion.models.pipelines import hub; hub.diffusers(); import bitsandbytes, torchao.quantization"
NET = "nn.Sequential(nn.Linear(4, 4))"
ADAPTED = f"from torch import nn; from rlfusion.models import lora; lora.attach({NET}, 'LoRA(rank=2)')"


@pytest.mark.parametrize("code", [OPENED, ADAPTED])
def test_the_import_of_the_libraries_of_pipelines_is_silent(code):
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert (said.stdout, said.stderr) == ("", "")
