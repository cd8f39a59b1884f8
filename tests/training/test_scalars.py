"""The reference of scalars: every one that a run writes is in it, and the page is what the table says."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from learned_agents import learned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlfusion.agents import AGENTS
from rlfusion.config import Finetune
from rlfusion.training import scalars
from rlfusion.training.tracking import flatten

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_written_from_the_table():
    assert PAGE.read_text() == scalars.page(), "make help writes it again"


def test_a_row_is_found_by_its_tag_and_a_name_of_yours_by_its_group():
    assert scalars.find("train/reward").meaning.startswith("mean reward of the walks")
    assert scalars.find("train/reward_ink").tag == "train/reward_NAME"
    assert scalars.find("evaluation/frechet").tag == "evaluation/frechet"
    assert scalars.find("train/unheard_of") is None
    tags = [row.tag for group in scalars.GROUPS.values() for row in group]
    assert len(set(tags)) == len(tags)


def test_every_scalar_of_a_run_is_in_the_table(tiny_root):
    for run in (tiny_root / "first", *(tiny_root / "cache").glob("base-*")):
        tags = EventAccumulator(str(run)).Reload().Tags()["scalars"]
        assert tags
        assert [tag for tag in tags if scalars.find(tag) is None] == []


@pytest.mark.parametrize("name", sorted(AGENTS.names()))
def test_every_scalar_of_an_agent_is_in_the_table(name):
    _, metrics = learned(name)
    assert [key for key in metrics if scalars.find(f"train/{key}") is None] == []


def test_the_settings_that_the_table_names_exist():
    text = " ".join(" ".join(row) for group in scalars.GROUPS.values() for row in group)
    named = set(re.findall(r"`((?:agent|monitor|rollout|evaluation)\.\w+)`", text))
    known = set(flatten(asdict(Finetune())))
    known |= {f"agent.{field.name}" for name in AGENTS.names() for field in fields(AGENTS[name])}
    assert named
    assert named <= known
