"""What the site needs beside the pages as they stand: formulas without a script, links to the pages that a sentence
names, and the reference of the public names.
"""

import re
import runpy
from pathlib import Path
from posixpath import relpath

import latex2mathml.converter

import rlfusion
from rlfusion.agents import NAMES

FENCE = re.compile(r"(^ *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
SYMBOL = re.compile(r"\$`([^`\n]+)`\$")
PAGE = re.compile(r"(?<!\[)`docs/([\w/-]+\.md)`")
CELL, CODE, JOINT = re.compile(r"<td.*?</td>", re.DOTALL), re.compile(r"(?<=<code>)[^<]{21,}"), re.compile(r"([/_.=,])")
GROUPS = {
    "Load, sample, train, judge": "Model load sample save finetune Run evaluate make_env",
    "Data": "Dataset digits load_data",
    "Denoisers and chains": "Denoiser Chain TimeGrid Policy Observation Gaussian walk chain_noise",
    "Schedules": "Cosine DDPM Geometric Karras Rectified ScaledLinear Trig VP ZeroSNR",
    "Kernels": "Ancestral CPS DDIM FlowSDE Langevin Renoise ReverseSDE",
    "Networks": "ResidualMLP UNet DiT",
    "Rewards": "Reward GroupWise PairWise score",
    "Errors": "RlfusionError ConfigError StateError StorageError UnavailableError UserCodeError NumericalError "
    "RewardError",
}
"""The public names, as the reference shows them; those that are not here come last."""
DOCS = Path(__file__).resolve().parents[1]
written = runpy.run_path(str(DOCS / "site" / "algorithms.py"))["written"]


def on_config(config):
    """Every page stands in the navigation: algorithms in their order, and at the end what mkdocs.yml does not place."""
    sections = {name: pages for entry in config.nav for name, pages in entry.items()}
    named = set(re.findall(r"'([^']+\.md)'", repr(config.nav)))
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    for page in sorted(set(pages) - named, key=_place):
        section = "Algorithms" if page.startswith("algorithms/") else "Background"
        sections[section].append({title(page).partition(":")[0]: page})
    return config


def _place(page: str) -> tuple[int, str]:
    name = Path(page).stem
    return NAMES.index(name) if name in NAMES else len(NAMES), page


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The page as MkDocs is to read it."""
    if page.file.src_uri == "reference.md":
        markdown += reference()
    markdown = written(markdown)
    parts = FENCE.split(markdown)
    parts[::2] = [told(part, page.file.src_uri) for part in parts[::2]]
    return "".join(parts)


def told(text: str, page: str) -> str:
    """Text outside of code: TeX as MathML, and ``docs/NAME.md`` as a link to it."""
    text = FORMULA.sub(lambda found: mathml(found[1], "block"), text)
    text = SYMBOL.sub(lambda found: f"<span>{mathml(found[1], 'inline')}</span>", text)  # it may begin a paragraph
    return PAGE.sub(lambda found: f"[{title(found[1])}]({relpath(found[1], str(Path(page).parent))})", text)


def on_page_content(html: str, page, config, files) -> str:
    """Long names in tables are broken behind what joins their parts, and nowhere else."""
    return CELL.sub(lambda cell: CODE.sub(lambda code: JOINT.sub(r"\1<wbr>", code[0]), cell[0]), html)


def mathml(tex: str, display: str) -> str:
    """A formula of TeX; what browsers draw by themselves."""
    return latex2mathml.converter.convert(" ".join(tex.split()), display=display)


def title(page: str) -> str:
    """The heading of a page of docs/."""
    return (DOCS / page).read_text("utf-8").partition("\n")[0].removeprefix("# ")


def reference() -> str:
    """The public names in groups, each by the object that it is."""
    lines = []
    grouped = {group: names.split() for group, names in GROUPS.items()}
    others = sorted(set(rlfusion.__all__) - {"__version__"} - {name for names in grouped.values() for name in names})
    for group, names in (grouped | ({"Further": others} if others else {})).items():
        lines.append(f"\n## {group}\n")
        for name in names:
            found = getattr(rlfusion, name)
            place = f"{found.__module__}.{found.__qualname__}"
            for room in ("rewards", "envs", "agents"):  # in a checkout they stand beside the package
                place = place.replace(f"rlfusion.{room}.", f"{room}.", 1)
            lines.append(f"::: {place}\n    options:\n      heading: rlfusion.{name}\n")
    return "\n".join(lines)
