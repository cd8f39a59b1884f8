"""The files of ``examples/cluster``: of the shape that their readers ask for, and with commands that ours reads."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlfusion import __version__
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.launching import _divided
from rlfusion.cli.words import RESUMABLE
from rlfusion.config.launch import Launch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "cluster"
FILES = sorted(path.name for path in FOLDER.iterdir())
LAUNCHER, KUBERAY = ["aws.yaml"], ["raycluster.yaml", "rayjob.yaml"]

GROUP = {"rayStartParams", "template"}
WORKERS = GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts"}
CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
JOB = {"entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
JOB |= {"submissionMode", "rayClusterSpec", "activeDeadlineSeconds"}
POD = {"containers", "volumes", "terminationGracePeriodSeconds"}
CONTAINER = {"name", "image", "env", "ports", "resources", "volumeMounts", "lifecycle"}
"""What KubeRay's ray.io/v1 and Kubernetes' v1 know, of what the files use."""


def text(name: str) -> str:
    return (FOLDER / name).read_text()


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods of a RayCluster's spec."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def test_the_launchers_file_is_what_rays_own_schema_asks_for():
    import jsonschema
    from ray import autoscaler

    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    for name in LAUNCHER:
        jsonschema.validate(read(name), schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(read(name) | {"head_nodes": 1}, schema)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launchers_node_types_are_consistent(name):
    held = read(name)
    types = held["available_node_types"]
    assert held["head_node_type"] in types
    assert sum(one["max_workers"] for one in types.values()) <= held["max_workers"]
    for one in types.values():
        assert set(one) <= {"node_config", "resources", "min_workers", "max_workers"}
        assert one.get("min_workers", 0) <= one["max_workers"]
    assert any("ray[default]" in command for command in held["setup_commands"])
    assert any("--dashboard-host=127.0.0.1" in command for command in held["head_start_ray_commands"])


@pytest.mark.parametrize("name", KUBERAY)
def test_the_manifests_have_the_shape_of_their_kind(name):
    held = read(name)
    assert (held["apiVersion"], set(held)) == ("ray.io/v1", {"apiVersion", "kind", "metadata", "spec"})
    assert held["kind"] == {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}[name]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", held["metadata"]["name"])
    if held["kind"] == "RayJob":
        assert set(held["spec"]) <= JOB
        assert held["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
        assert set(yaml.safe_load(held["spec"]["runtimeEnvYAML"])) <= {"env_vars", "pip", "uv", "working_dir"}
    spec = cluster_of(name)
    assert set(spec) <= CLUSTER
    assert set(spec["headGroupSpec"]) <= GROUP
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes texts"


@pytest.mark.parametrize("name", KUBERAY)
def test_the_pods_of_the_manifests_hold_together(name):
    for pod in pods(cluster_of(name)):
        assert set(pod) <= POD
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert set(container) <= CONTAINER
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["image"].endswith(f":{__version__}")
            assert all(isinstance(size, str) for size in container["resources"]["limits"].values())


def test_a_reachable_dashboard_asks_for_a_token():
    """Outside of a pod of its own a head that listens for others has one."""
    for pod in pods(cluster_of("raycluster.yaml")):
        for container in pod["containers"]:
            named = {one["name"] for one in container["env"]}
            assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= named
    script = text("slurm.sh")
    assert script.index("RAY_AUTH_MODE=token") < script.index("ray start")
    assert script.index("umask 077") < script.index("RAY_AUTH_TOKEN_PATH")


def test_the_script_of_slurm_is_one():
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)", text("slurm.sh"), re.MULTILINE)
    known = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "requeue", "open-mode"}
    assert set(options) <= known | {"signal"}
    assert len(options) == len(set(options))


SLURM = """
sleep() { :; }
srun() { :; }
scontrol() { [ "$1" = show ] && echo node1 || echo "$*" >> told; }
rlfusion() {
    trap 'exit 75' TERM
    echo "rlfusion $*" >> told
    for i in $(seq 400); do command sleep 0.05; done
    exit 1
}
source() { :; }
"""


@pytest.mark.parametrize("again", [False, True])
def test_the_script_of_slurm_saves_at_the_signal_and_queues_itself_again(tmp_path, again):
    """Run with SLURM's commands of the test's own; SIGTERM comes while the run is at work."""
    (tmp_path / "script.sh").write_text(text("slurm.sh").replace("set -euo pipefail", f"set -euo pipefail{SLURM}"))
    if again:
        (tmp_path / "ink").mkdir()
        (tmp_path / "ink" / "config.yaml").touch()
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NUM_NODES": "1"}
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "ROOT": str(tmp_path),
        **job,
    }
    process = subprocess.Popen(["bash", "script.sh"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "told").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    first, last = (tmp_path / "told").read_text().splitlines()
    assert (f"--resume {tmp_path}/ink" in first) == again
    assert last == "requeue 77"
    assert not list(tmp_path.glob(".ray-token*"))


STANDS_FOR = """#!/bin/bash
echo "$RAY_API_SERVER_ADDRESS $*" >> told
[ "$1" != launch ] || exit "${CODE:-0}"
"""


@pytest.mark.parametrize("code", [0, 75])
def test_the_job_is_launched_followed_and_looked_at(tmp_path, code):
    """With a command of the test's own; ``jobs/test_launched.py`` has the same commands on a real cluster."""
    (tmp_path / "rlfusion").write_text(STANDS_FOR)
    (tmp_path / "rlfusion").chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROOT": "/shared/runs", "NAME": "it", "CODE": str(code)}
    script = ["bash", str(FOLDER / "job.sh"), "--updates", "8"]
    assert subprocess.run(script, cwd=tmp_path, env=given, check=False).returncode == code
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert {line[0] for line in told} == {"http://127.0.0.1:8265"}
    assert [line[1] for line in told] == ["launch", "jobs", "sample"][: 1 if code else 3]
    own, arguments = _divided(told[0][3:], list(Launch.__dataclass_fields__))
    run = settings_of("finetune", arguments)
    assert own == ["--follow=true"]
    assert (run.root, run.name, run.updates) == ("/shared/runs", "it", 8)


def test_the_job_asks_for_the_folder_of_all_runs(tmp_path):
    done = subprocess.run(
        ["bash", str(FOLDER / "job.sh")], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode
    assert "ROOT: is the folder of all runs" in done.stderr


def test_the_dockerfile_installs_what_there_is():
    lines = [line for line in text("Dockerfile").replace("\\\n", " ").splitlines() if line and line[0] != "#"]
    assert {line.split()[0] for line in lines} <= {"ARG", "FROM", "COPY", "RUN", "USER", "ENV"}
    assert next(line.split()[0] for line in lines if line.split()[0] != "ARG") == "FROM"
    extras = re.search(r"/tmp/rlfusion\[([\w,]+)\]", text("Dockerfile"))[1].split(",")
    assert set(extras) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_all_files_name_one_version_of_ray():
    named = {
        version
        for name in FILES
        for version in re.findall(r"(?:RAY=|rayVersion: \"|ray\[default\]==)([\d.]+)", text(name))
    }
    assert len(named) == 1


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each rlfusion command of the files, its variables filled in."""
    for name in FILES:
        held = re.sub(r"^# ?", "", text(name), flags=re.MULTILINE).replace("\\\n", " ").replace(' "$@"', "")
        held = re.sub(r"\n *(?=else|fi|then)", " ", held) if name == "rayjob.yaml" else held
        for found in re.finditer(
            r"\brlfusion (supervise|launch) [^\n;&)]*", re.sub(r"\$\{?\w+\}?", "x", held.replace("$PORT", "6379"))
        ):
            yield name, shlex.split(found[0].replace("ROOT", "/shared"))[1:]


COMMANDS = [pytest.param(command, id=f"{name}-{n}") for n, (name, command) in enumerate(commands())]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_them_is_read_by_ours(command):
    if command[0] == "supervise":
        command = command[command.index("--") + 1 :]
        assert command[0] in RESUMABLE
        if "--resume" in command:
            assert command[1:] == ["--resume", command[2]]
            return
        arguments = command[1:]
    else:
        own, arguments = _divided(command[2:], list(Launch.__dataclass_fields__))
        assert own
        command = command[1:]
    run = settings_of(command[0], arguments)
    assert run.root not in ("", "runs")


def test_there_are_commands_to_be_read():
    assert len(COMMANDS) >= 5
