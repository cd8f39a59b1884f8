"""Runs of a comparison on the nodes of a Ray cluster: as many at once as it has places for, the same bits, what becomes
of those that die with their node, and a folder that a node does not see.
"""

import json
import sys
import time

import pytest
from clusters import standing
from stand_in_members import maker, said
from tiny_runs import TINY

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.common.stops import Signals
from rlfusion.common.weights import sha256
from rlfusion.config import Compare
from rlfusion.config.parts import Nodes
from rlfusion.jobs.compare import beside, placed
from rlfusion.training.deciding import digest, flat

SMALL = [*TINY[: TINY.index("--updates")], *TINY[TINY.index("--rollout.prompts") : TINY.index("--agent.micro_batch")]]
FEW = ["--budget_queries", 48, "--evaluations", 1, "--evaluation.samples", 60, "--guidance", "[]", "--best_of", "[]"]


def test_what_a_run_reserves():
    there = Nodes(address="auto")
    assert there.role(2, 3).each == {"CPU": 5.0}
    assert Nodes(address="auto", cpus_per_run=1.5, gpus_per_run=0.5, resources_per_run={"a": 1}).role(2, 3).each == {
        "CPU": 1.5,
        "GPU": 0.5,
        "a": 1,
    }
    config = Compare(ray=there, side_by_side="auto", seeds=3)
    assert beside.room(config) == 6, "the cluster places all that it has room for"
    assert digest(flat(Compare(seeds=3))) == digest(flat(config)) != digest(flat(Compare(seeds=4)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"address": "nowhere"}, r"ray.address = 'nowhere'"),
        ({"cpus_per_run": 2.0}, r"ray.cpus_per_run = 2.0: expected ray.address"),
        ({"wait_s": 5.0}, r"ray.wait_s = 5.0: expected ray.address"),
        ({"address": "auto", "gpus_per_run": 1.5}, r"ray.gpus_per_run = 1.5"),
        ({"address": "auto", "cpus_per_run": -1.0}, r"cpus_per_run = -1"),
        ({"address": "auto", "resources_per_run": {"CPU": 1.0}}, r"CPU has settings of its own"),
        ({"address": "auto", "connect_timeout_s": 0.0}, r"connect_timeout_s = 0"),
    ],
)
def test_what_no_cluster_can_have_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Nodes(**settings)


def test_a_gpu_that_nobody_reserves_is_refused():
    with pytest.raises(ConfigError, match=r"ray.gpus_per_run = 0 with device = cuda"):
        Compare(device="cuda", ray=Nodes(address="auto"))
    with pytest.raises(ConfigError, match="run_restarts = -1"):
        Compare(run_restarts=-1)


def test_a_process_of_a_node(tmp_path, monkeypatch):
    from rlfusion.rollout import ray_hosts

    monkeypatch.setattr(ray_hosts, "SEEN_S", 0.1)
    monkeypatch.setenv("RAY_SOMETHING", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    log, file = tmp_path / "log", tmp_path / "config.yaml"
    file.write_text("seed: 0")
    words, files = ["-c", "print('rlfusion: of before')"], {str(file): sha256(b"seed: 1")}
    host = ray_hosts.Host()
    assert "does not see" in (told := host.begin(words, str(log), files, str(tmp_path), "rlfusion: ", False))
    assert str(file) in told
    assert not log.exists(), "nothing was begun"
    log.write_text("rlfusion: of an earlier process\n")
    lines = "import os; print('rlfusion:', os.environ.get('RAY_SOMETHING'), os.environ['CUDA_VISIBLE_DEVICES'], "
    words = ["-c", f"{lines}os.getcwd()); raise SystemExit(4)"]
    for gpus, shown in ((False, ""), (True, "3")):
        assert host.begin(words, str(log), {str(file): sha256(b"seed: 0")}, str(tmp_path), "rlfusion: ", gpus) == ""
        while (ended := host.ended()) is None:
            time.sleep(0.02)
        assert ended == (4, f"rlfusion: None {shown} {tmp_path}")


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="Ray clusters run on Linux")
def test_runs_on_the_nodes_of_a_cluster(tiny_root, tmp_path, monkeypatch, capsys):
    """Stand-ins first: two meet on two nodes, one kills its actor and goes on, one is refused. Then real runs."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    monkeypatch.chdir(tmp_path)
    words = ["--agents", "ddpo(micro_batch=64)", "--rewards", "ink", "--seeds", 2, *SMALL, *FEW]
    with standing({"num_cpus": 1}, {"num_cpus": 1}) as nodes:
        address = nodes.cluster.address
        once = "once = folder / 'once'; first = not once.exists(); once.touch()\n"
        meet = "while not (folder.parent / 'run-{}' / 'begun').exists(): time.sleep(0.02)\n"
        with monkeypatch.context() as patch:
            members = maker(tmp_path, patch)(
                f"{once}{meet.format(1)}\nif first: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)",
                meet.format(0),
                "print('rlfusion: lr = 9: expected less', file=sys.stderr); sys.exit(2)",
            )
            progress, text = said()
            config = Compare(ray=Nodes(address=address))
            with Signals() as signals, placed.nodes(config, progress.say) as begin:
                beside.run(members, 3, tmp_path / "logs", signals, progress, 1, begin)
        assert [member.done for member in members] == [True, True, False]
        assert [member.problem for member in members] == ["", "", "refused: lr = 9: expected less"]
        assert "a0 on ink, seed 0: died: its node, or its actor there, was lost: restart 1 of 1" in text.getvalue()
        more = ["--name", "there", "--side_by_side", "auto", "--ray.address", address]
        assert main(["compare", *map(str, words), *more]) == 0
        assert main(["compare", *map(str, words), *more[:1], "wide", *more[2:], "--ray.cpus_per_run", "9"]) == 69
        assert "the cluster has no place for 1 of 1 runs (9 CPU each)" in capsys.readouterr().err
    assert main(["compare", *map(str, words), "--name", "here"]) == 0
    files = [sorted((tmp_path / "runs" / name).glob("*/metrics.jsonl")) for name in ("there", "here")]
    assert len(files[0]) == 2
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    tables = [json.loads((tmp_path / "runs" / name / "comparison.json").read_text()) for name in ("there", "here")]
    assert [(o["agent"], o["problem"]) for o in tables[0]] == [(o["agent"], o["problem"]) for o in tables[1]]
