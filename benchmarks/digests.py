"""The bits of every kind of run: a digest of the final weights of a small run of each agent, distillation method and
pretraining objective, and of the default ``finetune``.

    python benchmarks/digests.py --out before.json
    python benchmarks/digests.py --against before.json     # exit 1 and a line for each run that ended in other bits
    python benchmarks/digests.py --only "method sds" "agent grpo" --against before.json

A change that should move no bit is held to it by this script, on one machine and one version of torch.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

PRETRAIN = ("train.steps=40", "train.batch=32", "checkpoint_every=40", "evaluation.samples=60")
CHAIN = ("chain.steps=4",)
RUN = (
    *("updates=3", "checkpoint_every=3", "evaluation.samples=60", "monitor.samples=60", "reward=ink"),
    *("rollout.prompts=4", "rollout.samples_per_prompt=6", "rollout.item=10", "agent.micro_batch=64"),
)
WITH = {"sft": ("agent.data=digits",), "opd": ("agent.teacher_guidance=1.0",)}
"""What some agents cannot do without."""
DISTILL = ("method.steps=20", "method.batch=32", "checkpoint_every=1000", "evaluation.samples=60")


def weights(folder: Path) -> str:
    """A digest of all tensors in the safetensors files of a saved model, by name."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                digest.update(f"{name}\0".encode() + tensors.get_tensor(name).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run(root: Path, command: str, name: str, *settings: str) -> str:
    """Run a command quietly below ``root``, and return the digest of its model."""
    main: Callable[[list[str]], int] = entry_points(group="console_scripts", name="rlfusion")["rlfusion"].load()
    words = [command, "--root", str(root), "--name", name, *(f"--{setting}" for setting in settings)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    if code:
        return f"exit {code}: {said.getvalue().strip().splitlines()[-1]}"
    return weights(root / name / "model")


def runs(root: Path) -> dict[str, Callable[[], str]]:
    """What each run is called, and a function that runs it and returns its digest."""
    from rlfusion.agents import AGENTS
    from rlfusion.distill import METHODS
    from rlfusion.pretrain import PRESETS

    small = "model.net=ResidualMLP(width=32, depth=1)"
    base = [f"pretrain.{setting}" for setting in (*PRETRAIN[:3], small)]
    made = {"finetune": partial(run, root, "finetune", "finetune")}
    for agent in AGENTS:
        settings = (f"agent={agent}", *RUN, *base, *CHAIN, *WITH.get(agent, ()))
        made[f"agent {agent}"] = partial(run, root, "finetune", f"agent-{agent}", *settings)
    for name in PRESETS:
        settings = (f"objective={name}", small, *PRETRAIN)
        made[f"objective {name}"] = partial(run, root, "pretrain", f"objective-{name}", *settings)
    for method in METHODS:
        settings = (f"method={method}", *DISTILL, *base)
        made[f"method {method}"] = partial(run, root, "distill", f"method-{method}", *settings)
    return made


def main() -> int:
    """Print the digest of each run; compare them with a file's if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the digests as JSON")
    parser.add_argument("--against", type=Path, help="digests to compare with")
    parser.add_argument("--only", nargs="+", metavar="RUN", help='which runs, as "method sds" (default: all)')
    asked = parser.parse_args()
    expected = json.loads(asked.against.read_text()) if asked.against else {}
    found, wrong = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        known = runs(Path(folder))
        if unknown := [name for name in asked.only or () if name not in known]:
            parser.error(f"no run is called {unknown[0]!r}; there are {', '.join(known)}")
        for name in asked.only or known:
            found[name] = digest = known[name]()
            differs = asked.against is not None and expected.get(name) != digest
            wrong += differs
            print(name, digest, f"(was {expected.get(name)})" if differs else "", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} runs, {wrong} with other bits than expected" if asked.against else f"{len(found)} runs")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
