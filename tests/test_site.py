"""The site of docs/: it is built without a warning, asks the network for nothing, and says what the code says."""

import functools
import html
import http.server
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest

import rlfusion
from rlfusion.agents import AGENTS, NAMES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def module(name: str):
    """A file of docs/site/ as a module."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


ALGORITHMS, HOOKS = module("algorithms"), module("hooks")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; in strict mode a warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    place = tmp_path_factory.mktemp("site")
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(place))
        assert config.strict
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert warnings == []
    return place


def pages(site: Path) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}


def test_every_page_is_built_and_in_the_navigation(site):
    written = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    assert written <= pages(site).keys()
    navigation = (site / "index.html").read_text("utf-8").partition("md-content")[0]
    assert {name for name in written - {"index.html"} if f'href="{name}"' not in navigation} == set()
    assert not list(site.rglob("*.py"))


def test_the_site_asks_the_network_for_nothing(site):
    """A link that one may click is no request."""
    asked = r'<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"'
    assert {name: found for name, text in pages(site).items() if (found := re.findall(asked, text))} == {}
    styles = " ".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*[\"']?https?:", styles) == []
    assert not any("unpkg.com" in text or "googleapis" in text for text in pages(site).values())


def test_formulas_are_drawn_without_a_script(site):
    for name in NAMES:
        text = (site / "algorithms" / f"{name}.html").read_text("utf-8")
        assert "<math" in text
        assert "$$" not in text
        assert "$<code>" not in text
        assert re.findall(r'^<math[^>]*display="inline"', text, re.MULTILINE) == []  # its paragraph would end there


def test_names_in_tables_are_broken_where_their_parts_meet_if_at_all(site):
    text = (site / "metrics.html").read_text("utf-8")
    assert "<code>train/reward_std</code>" in text
    assert "<code>constraint/<wbr>NAME/<wbr>multiplier</code>" in text


def test_a_page_that_a_sentence_names_is_a_link():
    told = HOOKS.told("see `docs/learners.md` and [`docs/x.md`](x.md)", "algorithms/ddpo.md")
    assert told == "see [Learners side by side](../learners.md) and [`docs/x.md`](x.md)"
    assert HOOKS.told("$`x`$ costs $3", "a.md").endswith("</math></span> costs $3")


@pytest.mark.parametrize("name", [name for name in rlfusion.__all__ if name != "__version__"])
def test_the_reference_has_every_public_name(name, site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference.html").read_text("utf-8")))
    assert re.search(rf"^\s*rlfusion\.{name}\b", text, re.MULTILINE), name


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_has_a_page_that_says_what_the_code_says(name, site):
    page = (DOCS / "algorithms" / f"{name}.md").read_text("utf-8")
    for heading in ("What it optimises", "When to choose it", "When not", "What to expect", "Signs of failure"):
        assert f"\n## {heading}\n" in page
    shown = (site / "algorithms" / f"{name}.html").read_text("utf-8")
    for field in {field.name for field in fields(AGENTS.get(name))} - {"name"}:
        assert f"<td><code>{field}</code></td>" in shown
    text = html.unescape(re.sub(r"<[^>]+>", "", shown))
    assert all(line in text for line in ALGORITHMS.equations(name).splitlines()[1:-1])


def test_the_site_writes_what_a_page_has_of_the_code_again():
    stale = "<!-- settings of ddpo -->\nwords of before\n<!-- end of settings -->\n"
    page = ALGORITHMS.written(f"{stale}\n<!-- equations of nft -->\n<!-- end of equations -->\n")
    assert "words of before" not in page
    assert f"<!-- settings of ddpo -->\n{ALGORITHMS.table('ddpo')}\n<!-- end of settings -->" in page
    assert f"<!-- equations of nft -->\n{ALGORITHMS.equations('nft')}\n<!-- end of equations -->" in page
    assert ALGORITHMS.written(page) == page


def test_a_default_is_shown_as_it_is_typed():
    table = ALGORITHMS.table("ddpo")
    assert "| `decoupled` | `null` |" in table
    assert "| `clip_per_dim` | `false` |" in table
    assert "| `lr` | `0.001` |" in table


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOKED_AT = ("index", "concepts", "tutorial", "design", "metrics", "reference", "algorithms/ddpo", "learners")
HARNESS = """<!doctype html><body><script>
const pages = %s, found = {};
function next(i) {
  if (i == pages.length) { document.body.innerHTML = '<pre id="found">' + JSON.stringify(found) + '</pre>'; return; }
  const frame = document.createElement('iframe');
  frame.style = 'width: 1280px; height: 900px; border: 0';
  frame.onload = () => setTimeout(() => {
    const d = frame.contentDocument, e = d.documentElement;
    found[pages[i]] = [e.scrollWidth, e.clientWidth,
      [...d.images].filter(p => !p.complete || !p.naturalWidth).map(p => p.src)];
    frame.remove(); next(i + 1);
  }, 100);
  frame.src = pages[i] + '.html';
  document.body.append(frame);
}
next(0);
</script>"""


@pytest.mark.skipif(CHROMIUM is None or sys.platform != "linux", reason="no Chromium here")
def test_in_a_browser_nothing_is_missing_and_nothing_is_too_wide(site, tmp_path):
    missing: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_error(self, *said):
            missing.append(f"{self.path}: {said[1:]}")

        def log_message(self, *said):
            pass

    (site / "harness.html").write_text(HARNESS % json.dumps(LOOKED_AT))
    handler = functools.partial(Handler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                f"--user-data-dir={tmp_path}", "--virtual-time-budget=30000", "--dump-dom",
                f"http://127.0.0.1:{server.server_address[1]}/harness.html",
            ],
            capture_output=True, text=True, timeout=180, check=True,
        )  # fmt: skip
        server.shutdown()
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert found.keys() == set(LOOKED_AT)
    assert {name: held for name, held in found.items() if held[0] > held[1] or held[2]} == {}
    assert [path for path in missing if "favicon.ico" not in path] == []
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line and "rror" in line] == []
