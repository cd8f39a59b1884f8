"""Pages in a headless Chromium, where one is on the machine."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """<script>
const wrong = [];
addEventListener("error", e => wrong.push(e.message || "not loaded: " + (e.target.src || e.target.href)), true);
addEventListener("unhandledrejection", e => wrong.push(String(e.reason)));
addEventListener("load", () => {
  const root = document.documentElement, told = document.createElement("pre");
  const images = [...document.images];
  told.id = "probe";
  told.textContent = JSON.stringify({
    wrong, width: innerWidth, needed: Math.max(root.scrollWidth, document.body.scrollWidth),
    images: images.length, drawn: images.filter(one => one.complete && one.naturalWidth > 0).length,
  });
  document.body.append(told);
});
</script>"""


def browser() -> str:
    """The path of a Chromium, "" for none."""
    return next(filter(None, map(shutil.which, NAMES)), "")


def seen(page: Path, width: int, place: Path) -> dict[str, Any]:
    """What a browser finds of a page in a window of this width: errors of its console and of files that it asks for
    (``wrong``), how wide it is, its images. A copy of the page in ``place``, which has what lies beside it, is opened.
    """
    copy = place / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={place / 'profile'}", f"--window-size={width},900", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=170, check=True)
    told = re.search(r'<pre id="probe">(.*?)</pre>', said.stdout, re.DOTALL)
    assert told, said.stderr[-2000:]
    console = [line for line in said.stderr.splitlines() if ":CONSOLE" in line]
    found = json.loads(unescape(told[1]))
    return found | {"wrong": found["wrong"] + console}
