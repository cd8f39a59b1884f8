"""Libraries say nothing of their own where a pipeline is opened."""

import subprocess
import sys


def test_the_import_of_the_libraries_of_pipelines_is_silent():
    code = "from rlfusion.models.pipelines import hub; hub.diffusers(); import bitsandbytes"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert (said.stdout, said.stderr) == ("", "")
