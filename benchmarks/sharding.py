"""Every agent, pretraining objective and distillation method on 1, 2 and 4 ranks, whole and split: is it the same run?

    python benchmarks/sharding.py --ranks 1 2                         # some 10 minutes of one core
    python benchmarks/sharding.py --only "agent ddpo" "method dmd" --out table.json

Each row trains the tiny networks of the tests (``tests/support``) for a few updates in 4 shares: in one process, and in
the hands of 2 (and 4) processes of a gloo group, whole (``none``) and split (``fsdp``). Rows that the file has from an
earlier call stay, unless they are measured again.

    same          with ``learner.exact``: the digest of all weights is that of one process, on every rank
    difference    without it, on 2 ranks: the largest difference of a weight from one process
    bytes         what the first of 2 ranks holds of parameters (of all networks: teachers, references, acting copies),
                  gradients and moments; and the share with ``fsdp`` of that without
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

import ranked  # noqa: E402
import ranked_fits  # noqa: E402

from rlfusion.agents import AGENTS  # noqa: E402
from rlfusion.common import shards, storage  # noqa: E402
from rlfusion.training.optimization import Optimization  # noqa: E402
from rlfusion.training.optimizers import NamedOptimizer  # noqa: E402
from rlfusion.training.ranks import Ranks, joined  # noqa: E402

SHARES, PATIENCE_S = 4, 7200.0
NONE = SimpleNamespace(bytes={})
LORA = "LoRA(rank=4)"
FORMS = {
    "1 exact": (1, True, False),
    "1 summed": (1, False, False),
    "2 exact none": (2, True, False),
    "2 exact fsdp": (2, True, True),
    "2 summed none": (2, False, False),
    "2 summed fsdp": (2, False, True),
    "4 exact none": (4, True, False),
    "4 exact fsdp": (4, True, True),
}
"""Ranks, whether sums are exact, and whether networks are split."""


SETTINGS = {"qsm": "critic_updates=5", "dpo of stored pairs": "data='x'"}
"""Of agents, where they are not the defaults. What is stored the tests' own ``Beside`` has, whatever it is called."""
STORED = "dpo of stored pairs"


def names() -> list[str]:
    """The rows."""
    every = [name for agent in AGENTS for name in ([agent, STORED] if agent == "dpo" else [agent])]
    agents = [f"agent {name}, {trained}" for name in every for trained in ("all weights", "LoRA")]
    fits = [f"pretrain {fit}" for fit in ranked_fits.FITS]
    return [*agents, *fits, *(f"method {method}" for method in ranked_fits.METHODS)]


class Held:
    """What this process holds once each optimiser that was made has stepped, beside what it held before."""

    def __init__(self) -> None:
        self.others = WeakSet(_modules())
        self.made: list[Optimization] = []
        self.gradients: dict[int, int] = {}
        self.moments = 0
        self.bytes: dict[str, int] = {}

    def look(self) -> None:
        """Note the bytes, wherever another optimiser has got its moments."""
        states = [state for made in self.made for state in made.optimizer.inner.state.values()]
        moments = _bytes(value for state in states for value in state.values() if value.ndim)
        if moments == self.moments:
            return
        self.moments = moments
        own = [module for module in _modules() if module not in self.others]
        parameters = [p for module in own for p in module._parameters.values() if p is not None]
        self.bytes = {
            "parameters": _bytes(parameters),
            "gradients": sum(self.gradients.values()),
            "moments": moments,
        }


def _modules() -> list[nn.Module]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, nn.Module)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    own = [shards.own(tensor.detach()) for tensor in tensors if not tensor.is_meta]
    return sum(size for _, size in {(tensor.data_ptr(), tensor.nbytes) for tensor in own if tensor.nbytes})


@contextmanager
def watched() -> Iterator[Held]:
    """Within the context optimisers are looked at as they step."""
    held, make, step = Held(), Optimization.__init__, NamedOptimizer.step

    def made(self: Optimization, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        held.made.append(self)

    def stepped(self: NamedOptimizer) -> None:
        held.gradients[id(self)] = _bytes(p.grad for p in self.named.values() if p.grad is not None)
        step(self)
        held.look()

    Optimization.__init__, NamedOptimizer.step = made, stepped  # type: ignore[method-assign]
    try:
        yield held
    finally:
        Optimization.__init__, NamedOptimizer.step = make, step  # type: ignore[method-assign]


def trained(name: str, split: bool, folder: Path) -> tuple[str, list[float]]:
    """The digest and the weights of a row."""
    kind, _, what = name.partition(" ")
    if kind == "agent":
        agent, _, form = what.partition(", ")
        text = f"{agent.partition(' ')[0]}({SETTINGS.get(agent, '')})"
        weights, _ = ranked.trained(text, split, adapters=LORA if form == "LoRA" else "")
        return ranked.digest(weights), torch.cat([w.flatten() for w in weights]).tolist()
    if kind == "pretrain":
        digest, _, flat = ranked_fits.fitted(what, split)
        return digest, flat
    digest, _ = ranked_fits.method(what, folder, None, split)
    return digest, ranked_fits.student(folder)


def work(rank: int, count: int, forms: list[str], wanted: list[str], folder: str) -> dict[str, list[Any]]:
    """The rows of each form in the hands of ``rank``: digest, weights, and bytes."""
    torch.set_num_threads(1)
    told: dict[str, list[Any]] = {form: [] for form in forms}
    for form in forms:
        _, exact, split = FORMS[form]
        with joined(Ranks(rank, count, SHARES, exact)), storage.silent() if rank else nullcontext():
            for n, name in enumerate(wanted):
                with watched() if count == 2 and exact else nullcontext(NONE) as held:
                    found = trained(name, split, Path(folder) / f"{form}-{n}".replace(" ", "-"))
                told[form].append([*found, held.bytes])
                if not rank:
                    print(f"{form}: {name}", file=sys.stderr, flush=True)
    return told


def table(wanted: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """All rows, form by form."""
    found: dict[str, list[list[Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            forms = [form for form, (ranks, *_) in FORMS.items() if ranks == count]
            told = ranked.members(count, work, forms, wanted, folder)
            found |= {form: [one[form] for one in told] for form in forms}
    return [
        row(name, {form: [told[n] for told in ranks] for form, ranks in found.items()}) for n, name in enumerate(wanted)
    ]


def row(name: str, found: dict[str, list[Any]]) -> dict[str, Any]:
    """A row of what each rank found in each form: [digest, weights, bytes]."""
    one, summed = found["1 exact"][0], torch.tensor(found["1 summed"][0][1])
    same = {
        form.replace("exact ", ""): all(told[0] == one[0] for told in ranks)
        for form, ranks in found.items()
        if "exact " in form
    }
    difference = {
        form.replace("summed ", ""): float((torch.tensor(ranks[0][1]) - summed).abs().max())
        for form, ranks in found.items()
        if "summed " in form
    }
    held = {shard: found[f"2 exact {shard}"][0][2] for shard in ("none", "fsdp")}
    share = {what: round(held["fsdp"][what] / size, 3) for what, size in held["none"].items() if size}
    whole = sum(held["fsdp"].values()) / sum(held["none"].values())
    about = {"same": same, "difference": difference, "bytes": held}
    return {"row": name, **about, "share": share | {"all": round(whole, 3)}}


def told(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("| row | same bits | difference, none | difference, fsdp | parameters | gradients | moments | all |")
    print("|---|---|---|---|---|---|---|---|")
    for one in rows:
        bad = [form for form, same in one["same"].items() if not same]
        differences = " | ".join(f"{value:.0e}" for value in one["difference"].values())
        shares = " | ".join(f"{one['share'].get(of, 0):.2f}" for of in ("parameters", "gradients", "moments", "all"))
        print(f"| {one['row']} | {'NOT ' + ', '.join(bad) if bad else 'yes'} | {differences} | {shares} |")


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="the rows that begin so")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="1 2, or 1 2 4")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sharding.json")
    given = parser.parse_args()
    ranked.PATIENCE = PATIENCE_S
    ranked.CONTEXT.set_forkserver_preload(["ranked_fits", "peft", "torch.distributed.fsdp"])
    wanted = [name for name in names() if not given.only or name.startswith(tuple(given.only))]
    about = {"torch": torch.__version__, "python": platform.python_version()}
    new = {one["row"]: one | about for one in table(wanted, given.ranks)}
    before = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    rows = sorted(({one["row"]: one for one in before} | new).values(), key=lambda one: names().index(one["row"]))
    given.out.write_text(json.dumps({"shares": SHARES, "rows": rows}, indent=1) + "\n")
    told(rows)


if __name__ == "__main__":
    main()
