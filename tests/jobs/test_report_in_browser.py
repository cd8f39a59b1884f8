"""report.html in a real browser: no error in its console, nothing that is missing, no scrolling to the side."""

import json

import pytest
import torch
from browser import browser, seen
from made_runs import run

from rlfusion.config import CompareRuns
from rlfusion.jobs.compare import compare_runs
from rlfusion.jobs.sample_rewards import keep
from rlfusion.training.tracking import save_png

pytestmark = pytest.mark.skipif(not browser(), reason="there is no Chromium on this machine")

LONG = "/a/place/that/is/far/away/" + "and/has/folders/" * 8 + "rewards.py:score"


def test_a_report_is_whole_and_as_wide_as_its_window(tmp_path):
    runs = []
    for agent, gain in (("ddpo", 1.0), ("grpo", 2.0), ("nft", 3.0)):
        for seed in (0, 1):
            made = run(
                tmp_path, f"{agent}-{seed}", "--seed", seed, "--lora", "LoRA(rank=2)", agent=agent, gain=gain, alarm=3
            )
            for name in ("before", "after"):
                save_png(made / "samples" / f"{name}.png", torch.rand(3, 80, 900))
            (made / "diagnosis.md").write_text(f"## After 3 updates: what the reward does not see\n\n- {LONG}\n")
            for step in (0, 4):
                keep(made, step, torch.arange(20) % 10, torch.rand(20) + step)
            runs.append(str(made))
    page, folder = compare_runs(CompareRuns(runs, out=str(tmp_path / ("wide-" * 20))))
    assert "by seed and prompt" in page
    found = seen(folder / "report.html", 1280, tmp_path)
    assert found["wrong"] == []
    assert found["width"] == 1280
    assert found["needed"] <= 1280, json.dumps(found)
    assert found["images"] == found["drawn"] == 1 + 2 * len(runs)


def test_the_probe_finds_what_is_wrong(tmp_path):
    page = tmp_path / "page.html"
    body = "<img src='none.png'><div style='width: 2000px'>wide</div><script>console.error('told'); nowhere()</script>"
    page.write_text(f"<!DOCTYPE html><html><head></head><body>{body}</body></html>")
    found = seen(page, 1280, tmp_path)
    told = " ".join(found["wrong"])
    assert all(word in told for word in ("none.png", "nowhere is not defined", "told"))
    assert found["needed"] >= 2000
    assert (found["images"], found["drawn"]) == (1, 0)
