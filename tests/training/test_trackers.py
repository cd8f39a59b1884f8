"""Trackers beside TensorBoard: what those of others are told, by stand-ins with their signatures; what fails is told
once; a run that resumes goes on in the same run of its tracker; and no bit moves.
"""

import hashlib
import importlib
import json
import sys
import threading
from pathlib import Path
from unittest.mock import ANY

import pytest
import stand_in_trackers
import torch
from tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError, UnavailableError
from rlfusion.common.stops import StopRequested
from rlfusion.training.trackers import TRACKERS, Followed, feed, make_tracker, require_usable
from rlfusion.training.trackers.beside import following
from rlfusion.training.tracking import Tracker

TINY_NET = "ResidualMLP(width=32, depth=1)"
OURS = ("wandb", "trackio", "mlflow")
PICTURE = torch.linspace(0, 1, 60).reshape(3, 4, 5)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tracker of one's own, from which the stand-ins are imported."""
    monkeypatch.chdir(tmp_path)
    stand_in_trackers.write(tmp_path / "packages")
    (tmp_path / "own.py").write_text(stand_in_trackers.RECORDER)
    names = (*OURS, "mlflow.entities")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def follow(folder: Path, track: list[str], failures="warn", step=0, body=None) -> list[str]:
    """A run of two updates with these trackers; what is said."""
    said: list[str] = []
    run = Followed("my-run", folder, {"agent.name": "ddpo", "agent.lr": 0.1, "odd:name": "x" * 9000})
    folder.mkdir(exist_ok=True)
    with following(track, failures, run, said.append) as beside:
        tracker = Tracker(folder, step, beside)
        (body or write)(tracker)
    return said


def write(tracker: Tracker) -> None:
    tracker.text(0, "run/plan", "to improve")
    tracker.scalars(0, "evaluation", {"reward": 0.5, "gain": 0.0})
    tracker.image(0, "samples/before", PICTURE, ("a cat", "a dog"))
    tracker.scalars(1, "train", {"reward": 0.6, "queries": 24, "odd:name!": float("nan")})
    tracker.timing(1, {"seconds": 2.0})
    tracker.scalars(2, "train", {"reward": 0.7, "queries": 48})
    tracker.scalars(2, "evaluation", {"reward": 0.8, "gain": 1.0})
    tracker.results({"final/reward": 0.8})


def calls(package: str) -> list:
    return importlib.import_module(package).CALLS


def told(file="told.jsonl") -> list:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_wandb_is_told_all_over_the_queries(place):
    follow(place / "run", ["wandb(project='mine', tags='a, b', mode='offline')"])
    (_, begun), *rest = calls("wandb")
    assert begun["project"] == "mine"
    assert begun["tags"] == ["a", "b"]
    assert begun["config"]["agent.lr"] == 0.1
    assert (begun["id"], begun["resume"], begun["name"]) == (None, None, "my-run")
    assert ("define_metric", "*", "queries") in rest
    logged = [data for what, data, *_ in rest if what == "log"]
    assert {"evaluation/reward": 0.5, "evaluation/gain": 0.0, "queries": 0, "updates": 0} in logged
    assert {"evaluation/reward": 0.8, "evaluation/gain": 1.0, "queries": 48, "updates": 2} in logged
    assert {"timing/seconds": 2.0, "queries": 24, "updates": 1} in logged
    assert not [
        call for call in rest if call[0] == "log" and call[2] is not None
    ]  # wandb drops a step that comes again
    (picture,) = [data["samples/before"] for data in logged if "samples/before" in data]
    assert (picture.shape, picture.caption) == ((4, 5, 3), "a cat | a dog")
    what, code, summary, config = rest[-1]
    assert (what, code, summary) == ("finish", 0, {"final/reward": 0.8, "status": "finished"})
    assert config == {"run/plan": "to improve"}


def test_trackio_is_told_all_at_its_queries(place):
    follow(place / "run", ["trackio(project='mine')"])
    (_, begun), *rest = calls("trackio")
    assert (begun["project"], begun["name"], begun["resume"]) == ("mine", "my-run", "never")
    logged = [(data, step) for what, data, step in rest[:-1]]
    assert ({"evaluation/reward": 0.8, "evaluation/gain": 1.0, "updates": 2}, 48) in logged
    assert ({"final/reward": 0.8}, 48) in logged
    assert [data["samples/before"].caption for data, _ in logged if "samples/before" in data] == ["a cat | a dog"]
    assert logged[-1] == ({"status": "finished"}, 48)
    assert rest[-1] == ("finish",)


def test_mlflow_is_told_all_at_its_queries_in_the_characters_that_it_takes(place):
    follow(place / "run", ["mlflow(experiment='mine')"])
    made, params, held, *rest = calls("mlflow")
    assert made == ("create_run", "7", "my-run")
    assert dict(params[2])["odd_name"] == "x" * 500
    assert held[1] == "config.json"
    assert held[2]["odd:name"] == "x" * 9000
    metrics = [metric for what, metrics, *_ in rest if what == "log_batch" for metric in metrics]
    assert ("evaluation/reward", 0.8, 48) in metrics
    assert ("updates", 2.0, 48) in metrics
    assert [value != value for key, value, _ in metrics if key == "train/odd_name_"] == [True]
    assert ("log_image", "samples/before", 0) in rest
    assert ("log_text", "prompts/samples/before.txt", "a cat\na dog") in rest
    assert rest[-1] == ("set_terminated", "made-by-mlflow", "FINISHED")


@pytest.mark.parametrize("name", OURS)
def test_a_resumed_run_goes_on_in_the_same_run_of_its_tracker_and_says_nothing_twice(place, name):
    track = [f"{name}(mode='offline')" if name == "wandb" else name]
    follow(place / "run", track)
    assert len(json.loads((place / "run" / "trackers.json").read_text())) == 1
    calls(name).clear()

    def repeated(tracker: Tracker) -> None:
        tracker.scalars(2, "train", {"reward": 0.7, "queries": 48})  # as before, bit for bit
        tracker.scalars(2, "evaluation", {"reward": 0.9, "gain": 1.5})  # of other settings
        tracker.scalars(3, "train", {"reward": 0.75, "queries": 72})

    follow(place / "run", track, step=1, body=repeated)
    said = str(calls(name))
    assert "0.9" in said
    assert "0.75" in said
    assert "0.7," not in said
    assert {"wandb": "made-by-wandb", "trackio": "'resume': 'allow'", "mlflow": "update_run"}[name] in said
    assert name != "wandb" or "'resume': 'allow'" in said
    assert name != "mlflow" or ("create_run" not in said and "odd_name" not in said)


def test_a_tracker_that_is_new_to_a_run_gets_what_went_before(place):
    follow(place / "run", [])
    follow(place / "run", ["own.py:Recorder"], step=1, body=lambda tracker: None)
    assert [line[1:] for line in told() if line[0] == "scalars"] == [
        [[0, 0], {"evaluation/reward": 0.5, "evaluation/gain": 0.0}],
        [
            [1, 24],
            {"train/reward": 0.6, "train/queries": 24, "train/odd:name!": pytest.approx(float("nan"), nan_ok=True)},
        ],
    ]


@pytest.mark.parametrize("breaks", ["begin", "scalars", "image", "text", "summary", "finish"])
def test_what_fails_is_told_once_and_the_rest_goes_on(place, breaks):
    said = follow(place / "run", [f"own.py:Recorder(breaks='{breaks}')", "own.py:Recorder(file='other.jsonl')"])
    failures = [line for line in said if "failed" in line]
    assert failures == [
        "tracker 'Recorder' failed: OSError: the server is gone; the training goes on without what it lost"
    ]
    assert [line[0] for line in told("other.jsonl")][-1] == "finish"
    if breaks not in ("begin", "finish"):
        assert [line[0] for line in told()][-1] == "finish"
    assert Path("told.jsonl").exists() == (breaks != "begin")
    lost = {"begin": 10, "scalars": 5}.get(breaks)
    assert [line for line in said if "lost" in line and "entries" in line] == (
        [f"tracker 'Recorder' lost {lost} entries; metrics.jsonl and TensorBoard have them"] if lost else []
    )


@pytest.mark.parametrize("breaks", ["begin", "scalars", "summary"])
def test_or_it_stops_the_training_where_that_is_asked_for(place, breaks):
    with pytest.raises(UnavailableError, match=r"tracker 'Recorder' failed: OSError: the server is gone"):
        follow(place / "run", [f"own.py:Recorder(breaks='{breaks}')"], failures="stop")


def test_a_tracker_that_hangs_holds_nobody_up(place, monkeypatch):
    monkeypatch.setattr(feed, "FINISH_S", 0.1)
    free = threading.Event()
    said: list[str] = []
    one = feed.Feed("slow", said.append)
    one.put(free.wait)
    one.close(lambda: None)
    free.set()
    assert said == ["tracker 'slow' is not done within 0 s: what it has yet to write may be lost"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(StopRequested(15), "stopped"), (KeyboardInterrupt(), "stopped"), (ValueError("no"), "failed")],
)
def test_how_it_ended_is_told(place, error, status):
    def body(tracker: Tracker) -> None:
        raise error

    with pytest.raises(type(error)):
        follow(place / "run", ["own.py:Recorder", "wandb(mode='offline')", "mlflow"], body=body)
    assert told()[-1] == ["finish", status]
    assert calls("wandb")[-1][1] == (1 if status == "failed" else 0)
    assert calls("mlflow")[-1][2] == {"stopped": "KILLED", "failed": "FAILED"}[status]


@pytest.mark.parametrize("name", OURS)
def test_one_that_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *[p for p in sys.path if "site-packages" not in p]])
    monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / name).mkdir()  # as wandb and mlflow leave one behind: no package
    with pytest.raises(ConfigError, match=rf"track = {name}: {name} is not installed: pip install {name}"):
        require_usable([name])


def test_what_a_tracker_lacks_is_said_before_anything_runs(place, capsys):
    known = {
        "wand": "did you mean 'wandb'?",
        "wandb(projekt='a')": "did you mean 'project'?",
        "wandb": "expected an account (wandb login, or WANDB_API_KEY), or wandb(mode='offline')",
        "own.py:Recorder(missing=True)": "no module named 'recorder'",
        "own.py:json": "without",
        "mlflow,mlflow": "expected each once",
    }
    for text, said in known.items():
        assert main(["finetune", "--track", text, "--root", str(place / "runs")]) == 2
        assert said in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_all_that_are_built_in_are_trackers():
    assert sorted(TRACKERS) == sorted(OURS)
    for name in TRACKERS:
        make_tracker(name)


def test_a_run_that_is_followed_has_the_bits_of_one_that_is_not(place, with_classifiers):
    with_classifiers(place / "runs")
    tiny = [str(word) for word in (*TINY, "--reward", "ink", "--root", place / "runs", "--updates", 2)]
    assert main(["finetune", *tiny, "--name", "plain"]) == 0
    assert main(["finetune", *tiny, "--name", "followed", "--track", "own.py:Recorder"]) == 0
    plain, followed = place / "runs/plain", place / "runs/followed"
    for name in ("metrics.jsonl", "model/weights.safetensors", "summary.json"):
        assert (
            hashlib.sha256((plain / name).read_bytes()).digest()
            == hashlib.sha256((followed / name).read_bytes()).digest()
        )
    kinds = [line[0] for line in told()]
    assert (kinds[0], kinds[-2:]) == ("begin", ["summary", "finish"])
    assert kinds.count("image") >= 2
    steps = [line[1] for line in told() if line[0] == "scalars" and "train/reward" in line[2]]
    assert steps == [[1, 24], [2, 48]]
    assert next(line for line in told() if line[0] == "image")[4] == [str(n) for n in range(10)]
    assert main(["finetune", "--resume", str(followed), "--change", "updates=3"]) == 0
    assert [line[1] for line in told() if line[0] == "begin"] == ["", "number one"]
    assert [line[1] for line in told() if line[0] == "scalars" and "train/reward" in line[2]] == [*steps, [3, 72]]


FEW_STEPS = ["--checkpoint_every", "20", "--evaluation.samples", "50"]
SHORT = {
    "pretrain": ["--train.steps", "40", "--train.batch", "16", "--model.net", TINY_NET, *FEW_STEPS],
    "distill": ["--teacher", "first", "--method", "cd", "--method.steps", "40", "--method.batch", "16", *FEW_STEPS],
}


@pytest.mark.parametrize("command", SHORT)
def test_a_training_without_rewards_is_followed_over_its_updates(command, place, tiny_root, capsys):
    words = [command, "--root", str(tiny_root), *(w.replace("first", f"{tiny_root}/first") for w in SHORT[command])]
    for name, more in (("alone", []), ("seen", ["--track", "own.py:Recorder"])):
        assert main([*words, "--name", f"{command}-{name}", *more]) == 0
    alone, seen = (tiny_root / f"{command}-{name}" for name in ("alone", "seen"))
    weights = "model/weights.safetensors"
    assert (alone / weights).read_bytes() == (seen / weights).read_bytes()
    lines = told()
    assert [line[0] for line in (lines[0], lines[-1])] == ["begin", "finish"]
    assert lines[-1] == ["finish", "finished"]
    logged = [line for line in lines if line[0] == "scalars" and not any("timing/" in name for name in line[2])]
    assert [line[1] for line in logged] == [[20, 20], [40, 40], [40, 40]], "no line twice"
    assert "evaluation/frechet" in logged[-1][2]
    assert [line[1:] for line in lines if line[0] == "image"] == [[[40, 40], "samples", ANY, ANY]]
    assert [set(line[1]) >= {"final/frechet"} for line in lines if line[0] == "summary"] == [True]
    assert "tracked by Recorder: a shelf" in capsys.readouterr().err
    assert main([*words, "--name", "no", "--track", "own.py:Recorder(missing=True)"]) == 2
    assert not (tiny_root / "no").exists()
