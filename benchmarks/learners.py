"""Every learner on every reward, on digits: the page of all, the curves of each, and the table of the winners.

Each file of ``learners/`` is the ``rlfusion compare --config`` of one reward. A comparison that is in the folder is
resumed where it was stopped and not run again where it is done. What the runs have found is kept in
``results/learners.json``, and all that is drawn is drawn of it:

    python benchmarks/learners.py --root runs/learners     # run what is not done, then draw
    python benchmarks/learners.py --so_far --reward ink    # keep and draw what is done of a reward, run nothing
    python benchmarks/learners.py --draw                   # draw what is kept

* docs/learners.md, with docs/pictures/learners-REWARD.svg;
* docs/algorithms/NAME.svg, the tables of runs on those pages, and that of the winners in index.md beside them.
"""

import argparse
import json
import platform
from pathlib import Path

import learners_page
import learners_plots
import torch
from learners_record import Race, short

from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main as rlfusion
from rlfusion.config import Compare
from rlfusion.config.compare import shown, written
from rlfusion.jobs.compare import paired
from rlfusion.jobs.compare.baselines import BASE
from rlfusion.jobs.compare.members import place_of
from rlfusion.jobs.curves import Point, base_of, curve
from rlfusion.training.identity import Record

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "benchmarks" / "learners"
RECORD = ROOT / "benchmarks" / "results" / "learners.json"
DOCS = ROOT / "docs"
REWARDS = ("ink", "class_logprob", "jpeg_compressibility", "symmetry")


def raced(reward: str, root: Path, so_far: bool = False) -> Race:
    """The comparison of a reward, run first where it is not done; or, ``so_far``, as it stands.

    Raises:
        SystemExit: the command failed.
    """
    path, folder = CONFIGS / f"{reward}.yaml", root / reward
    if not so_far and not (folder / "comparison.json").is_file():
        new = ["--config", str(path), "--root", str(root), "--name", reward]
        code = rlfusion(["compare", *(["--resume", str(folder)] if folder.exists() else new)])
        if code:
            raise SystemExit(code)
    return found(reward, folder, settings_of("compare", ["--config", str(path)]))


def found(reward: str, folder: Path, config: Compare) -> Race:
    """What a comparison has in its folder, of the learners that are done on every seed."""
    curves: dict[str, list[list[Point]]] = {}
    prompts: dict[str, list[dict[str, float]]] = {}
    for row in config.rows():
        places = [folder / place_of(row.name, reward, seed) for seed in range(config.seeds)]
        if all(_finished(place) for place in places):
            curves[row.name] = [curve(place) for place in places]
            cells = [paired.of_run(*of) for of in zip(places, range(config.seeds), curves[row.name])]
            prompts[row.name] = [{str(prompt): short(gain) for (_, prompt), gain in one.items()} for one in cells]
    return Race(
        reward=reward,
        made={"torch": torch.__version__.partition("+")[0], "python": platform.python_version()},
        config={
            "budget": config.budget_queries,
            "seeds": config.seeds,
            "samples": config.evaluation.samples,
            "target": config.target,
            "quality": config.quality,
        },
        baselines=_baselines(reward, folder, next(iter(curves), "")),
        agents={shown(text): written(text) for text in config.agents},
        curves=curves,
        prompts=prompts,
    )


def _finished(place: Path) -> bool:
    return (place / "run.json").is_file() and Record.read(place).sealed is not None


def _baselines(reward: str, folder: Path, agent: str) -> dict[str, dict[str, float]]:
    """What is said of those of a comparison; while it is not done of the base alone, by a learner's run of seed 0."""
    if (folder / "baselines.json").is_file():
        said = json.loads((folder / "baselines.json").read_text())[reward]
    else:
        said = {BASE: base_of(folder / place_of(agent, reward, 0))}
    return {name: {key: short(value) for key, value in values.items()} for name, values in said.items()}


def record(race: Race, file: Path) -> None:
    """Keep what was found of a reward, and with what it was, beside what there is of others."""
    kept = json.loads(file.read_text()) if file.is_file() else {}
    kept[race.reward] = race.kept()
    ordered = {reward: kept[reward] for reward in REWARDS if reward in kept}
    file.write_text(json.dumps(ordered, separators=(",", ":")).replace("]]],", "]]],\n") + "\n")


def draw(file: Path, docs: Path) -> None:
    """Write the page, the figures and the table, of the record."""
    races = [Race.read(one) for one in json.loads(file.read_text()).values()]
    names = list(dict.fromkeys(name for race in races for name in race.agents))
    for race in races:
        learners_plots.side_by_side(race, names, docs / "pictures" / f"learners-{race.reward}.svg")
    learners_plots.of_each(races, docs / "algorithms")
    (docs / "learners.md").write_text(learners_page.page(races, CONFIGS))
    index = docs / "algorithms" / "index.md"
    index.write_text(learners_page.with_winners(index.read_text(), races))
    for page in sorted((docs / "algorithms").glob("*.md")):
        page.write_text(learners_page.with_runs(page.read_text(), races))


def main() -> None:
    """Run what is not done, keep it, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/learners"))
    parser.add_argument("--reward", action="append", choices=REWARDS, help="run and keep this one; default: all")
    parser.add_argument("--so_far", action="store_true", help="run nothing: keep the learners that are done")
    parser.add_argument("--draw", action="store_true", help="run nothing, keep nothing: draw what is kept")
    args = parser.parse_args()
    for reward in [] if args.draw else args.reward or REWARDS:
        record(raced(reward, args.root, args.so_far), RECORD)
    draw(RECORD, DOCS)


if __name__ == "__main__":
    main()
