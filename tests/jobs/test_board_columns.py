"""The columns of HPARAMS, as TensorBoard itself answers with them: those of all runs, of whatever version."""

import json
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import BasicLoader, TBContext
from tensorboard.plugins.hparams.api_pb2 import Experiment, HParamInfo
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, create_summary_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import summary
from werkzeug.test import Client

from rlfusion.cli.arguments import settings_of
from rlfusion.common.errors import ConfigError
from rlfusion.jobs.board_columns import Together, plugins
from rlfusion.jobs.finetune import about
from rlfusion.training.identity import Record
from rlfusion.training.tracking import Events, Tracker


def data(folder: Path, *names: str) -> MultiplexerDataProvider:
    """What TensorBoard has read of these runs, in this order."""
    multiplexer = EventMultiplexer({name: str(folder / name) for name in names})
    return MultiplexerDataProvider(multiplexer.Reload(), str(folder))


def answers(plugin: HParamsPlugin) -> tuple[dict, dict]:
    """The page and its rows, {run: {column: value}}, as the browser is told of them."""
    apps = plugin.get_plugin_apps()
    page = Client(apps["/experiment"]).get("/", query_string={"request": "{}"}).json
    asked = json.dumps({"startIndex": 0, "sliceSize": 100, "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN"]})
    rows = Client(apps["/session_groups"]).get("/", query_string={"request": asked}).json["sessionGroups"]
    return page, {
        row["name"]: row["hparams"] | {m["name"]["tag"]: m["value"] for m in row.get("metricValues", [])}
        for row in rows
    }


def shared(provider: MultiplexerDataProvider) -> HParamsPlugin:
    (loader,) = [one for one in plugins() if isinstance(one, BasicLoader) and one.plugin_class is HParamsPlugin]
    return loader.load(TBContext(data_provider=provider))


def named(page: dict) -> tuple[list[str], list[str]]:
    return [one["name"] for one in page["hparamInfos"]], [one["name"]["tag"] for one in page["metricInfos"]]


def older(folder: Path, settings: dict, metrics: dict) -> None:
    """A run whose row is written at its end, with the columns that it has."""
    events = Events(folder)
    for one in summary.hparams(settings, metrics):
        events.add(None, summary=one)
    events.scalars(None, metrics)


@pytest.fixture
def runs(tmp_path):
    """One of an earlier version, one that is done, one at work."""
    for name in ("old", "done", "at work"):
        (tmp_path / name).mkdir()
    older(tmp_path / "old", {"agent": "ddpo", "model": "digits", "seed": 0}, {"final/reward": 0.5, "final/odd": 1.0})
    columns = {"agent": "", "seed": 0, "kl": 0.0}
    for name, kl in (("done", 0.5), ("at work", 0.25)):
        row = {"agent": "grpo", "seed": 0, "kl": kl}
        Tracker(tmp_path / name).row(row, columns, ["final/gain", "final/queries to the goal", "final/reward"])
    Tracker(tmp_path / "done").results({"final/gain": 2.0, "final/queries to the goal": None, "final/reward": 0.75})
    return tmp_path


def test_tensorboard_alone_has_the_columns_of_one_run(runs):
    plugin = HParamsPlugin(TBContext(data_provider=data(runs, "old", "done", "at work")))
    assert named(answers(plugin)[0]) == (["agent", "model", "seed"], ["final/reward", "final/odd"])


@pytest.mark.parametrize("order", [("old", "done", "at work"), ("at work", "done", "old")])
def test_a_board_has_the_columns_of_all_runs_in_whatever_order_it_meets_them(runs, order):
    page, rows = answers(shared(data(runs, *order)))
    columns, metrics = named(page)
    assert columns == ["agent", "kl", "model", "seed"]  # those that differ first
    assert metrics == ["final/gain", "final/queries to the goal", "final/reward", "final/odd"]  # the newest run's first
    assert [one["differs"] for one in page["hparamInfos"]] == [True, True, False, False]
    assert rows == {
        "old": {"agent": "ddpo", "model": "digits", "seed": 0, "final/reward": 0.5, "final/odd": 1.0},
        "done": {"agent": "grpo", "seed": 0, "kl": 0.5, "final/gain": 2.0, "final/reward": 0.75},
        "at work": {"agent": "grpo", "seed": 0, "kl": 0.25},
    }


def test_a_column_has_the_title_that_a_run_gives_it(runs):
    (runs / "titled").mkdir()
    page = Experiment(hparam_infos=[HParamInfo(name="kl", display_name="KL", description="to the base")])
    told = create_summary_metadata(HParamsPluginData(experiment=page))
    Events(runs / "titled").add(None, summary={"value": [{"tag": EXPERIMENT_TAG, "metadata": told}]})
    found = answers(shared(data(runs, "done", "titled")))[0]["hparamInfos"]
    assert {one["name"]: (one["displayName"], one["description"]) for one in found} == {
        "agent": ("", ""),
        "kl": ("KL", "to the base"),
        "seed": ("", ""),
    }


def test_what_is_no_column_is_as_it_was(runs):
    Tracker(runs / "done").text(0, "run/plan", "to improve")
    inner = data(runs, "done", "old")
    for name in ("text", "hparams"):
        asked = {"experiment_id": "", "plugin_name": name}
        plain, ours = (one.list_tensors(RequestContext(), **asked) for one in (inner, Together(inner)))
        assert plain.keys() == ours.keys()
        for run, tags in plain.items():
            assert tags.keys() == ours[run].keys()
            assert all(ours[run][tag] == held for tag, held in tags.items() if tag != EXPERIMENT_TAG)
    assert Together(inner).list_runs(RequestContext(), experiment_id="") == inner.list_runs(
        RequestContext(), experiment_id=""
    )


def test_without_rows_there_are_no_columns(tmp_path):
    (tmp_path / "it").mkdir()
    Tracker(tmp_path / "it").scalars(1, "evaluation", {"gain": 0.5})
    page, rows = answers(shared(data(tmp_path, "it")))
    assert named(page) == ([], [])
    assert rows == {}


def test_runs_of_a_comparison_share_their_columns():
    usual, window, text = ({"agent": "grpo"}, {"with agent.window": 3}, {"with agent.window": "auto"})
    assert about.shared([usual | window, usual]) == about.COLUMNS | {"agent": "", "with agent.window": 3}
    for rows in ([window, text], [text, window]):  # of two kinds the text, which can say both
        assert about.shared(rows)["with agent.window"] == "auto"
    row = about.columns(settings_of("finetune", ["--agent", "grpo"]))
    assert row.keys() == about.COLUMNS.keys()
    assert all(isinstance(row[name], str) == isinstance(held, str) for name, held in about.COLUMNS.items())


@pytest.mark.parametrize(
    ("held", "said"), [("{", "is damaged"), ("[]", "holds no columns"), ('{"lr": null}', "holds no columns")]
)
def test_columns_that_are_damaged_are_said_to_be(tmp_path, held, said):
    (tmp_path / about.FILE).write_text('{"with lora": "LoRA(rank=2)"}')
    assert about.beside(tmp_path / "it") == {}, "a file of that name, which is of no comparison"
    Record("compare", "it", {}, {}, ()).write(tmp_path)
    assert about.beside(tmp_path / "it") == {"with lora": "LoRA(rank=2)"}
    (tmp_path / about.FILE).write_text(held)
    with pytest.raises(ConfigError, match=f"{os.fspath(tmp_path)}.*{said}"):
        about.beside(tmp_path / "it")
    (tmp_path / about.FILE).unlink()
    assert about.beside(tmp_path / "it") == {}
    (tmp_path / about.FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        about.beside(tmp_path / "it")
