"""rlfusion: reward fine-tuning of diffusion models.

The denoising chain is a Markov decision process, the diffusion model is its policy, and a learner improves the
policy for a reward. See README.md for a first run and docs/design.md for the mathematics of the core.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

if not (_Path(__path__[0]) / "envs").is_dir():  # in a checkout envs/, rewards/ and agents/ stand beside this folder
    __path__.append(str(_Path(__path__[0]).parent))
