"""A virtual environment beside the tests' own, made offline: their packages, and modules of its own before them."""

import sys
import venv
from pathlib import Path


def environment(folder: Path, **modules: str) -> Path:
    """The Python of a new environment in ``folder`` that has the given modules, by name their text."""
    venv.create(folder, with_pip=False)
    (own,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in (str(Path(__file__).parents[2]), *sys.path) if Path(path).is_dir()]
    (own / "beside.pth").write_text("\n".join(ours))
    for name, text in modules.items():
        (own / f"{name}.py").write_text(text)
    return folder / "bin" / "python"
