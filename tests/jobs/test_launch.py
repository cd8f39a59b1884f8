"""Runs as jobs of a Ray cluster: what travels, and what is refused before anything does."""

import io
import json
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_ray import FakeRay
from tiny_runs import TINY

from rlfusion import __version__, config
from rlfusion.cli import launching
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.cli.settings_tree import command_trees
from rlfusion.cli.words import RESUMABLE
from rlfusion.common.errors import ConfigError, StorageError, UnavailableError
from rlfusion.config.launch import Jobs, Launch
from rlfusion.jobs.launch import arrival, cluster, environment, job, wheel
from rlfusion.jobs.launch.inputs import Inputs
from rlfusion.jobs.launch.job import new_order, resume, submit
from rlfusion.rollout import ray_cluster

REWARD = "def brightness(samples, cond):\n    return samples.flatten(1).mean(1)\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a reward and data of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a red cat\na blue cat\n")
    np.savez(tmp_path / "images.npz", images=np.zeros((8, 8, 8, 3), np.uint8), labels=np.arange(8) % 2)
    folder = tmp_path / "pets" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"png")
    (tmp_path / "list.csv").write_text("file_name,label\npets/cat/a.png,cat\n")
    return tmp_path


def inputs(root: str = "/shared/runs", *shared: str) -> Inputs:
    return Inputs(Path(root), tuple(map(Path, (root, *shared))))


def order(*arguments: object, command: str = "finetune", **settings):
    run = settings_of(command, [*map(str, arguments), "--root", "/shared/runs"])
    return new_order(Launch(**settings), command, run, lambda _: None)


def held(made) -> dict:
    return yaml.safe_load(made.files["config.yaml"])


def moved(files, name: str) -> str:
    """The path on the cluster of the one file or folder of that name that travels."""
    (place,) = {"/".join(path.split("/")[:3]) for path in files if path.split("/")[2] == name}
    return f"/shared/runs/cache/{place}"


def test_a_file_of_the_users_own_travels_and_is_called_there(here):
    made = order("--reward", "mine.py:brightness")
    there = moved([p for p in made.files if p.startswith("inputs/")], "mine.py")
    assert held(made)["reward"] == f"{there}:brightness"
    assert [content for path, content in made.files.items() if path.endswith("mine.py")] == [REWARD.encode()]
    assert made.folder == Path("/shared/runs/ddpo-brightness-seed0")


def test_what_a_run_reads_there_is_what_was_read_here(here):
    """All settings but the places of files are the same, and the nodes' cluster is the job's."""
    arguments = [*map(str, TINY), "--reward", "mine.py:brightness", "--root", "/shared/runs"]
    run = settings_of("finetune", arguments)
    for env, waits in (("none", {}), ("uv", {"connect_timeout_s": 1800.0})):
        made = order(*arguments[:-2], env=env)
        expected = json.loads(json.dumps(asdict(run)))
        expected["ray"] |= {"address": "auto", **waits}
        expected["ray"]["limits"] |= {"start_s": 1800.0} if waits else {}
        expected["reward"] = held(made)["reward"]
        assert held(made) == expected


@pytest.mark.parametrize("env", ["none", "uv"])
def test_the_runs_of_a_comparison_stay_with_the_job_unless_they_have_an_address(env):
    waits = 1800.0 if env == "uv" else 60.0
    alone, there = (settings_of("compare", words) for words in ([], ["--ray.address", "auto"]))
    ray = [job._at_home(asdict(one)["ray"], Launch(env=env)) for one in (alone, there, config.Pretrain())]
    assert ray[0] == asdict(alone)["ray"]
    assert ray[1] == asdict(there)["ray"] | {"connect_timeout_s": waits}
    assert ray[2] == asdict(config.Pretrain())["ray"] | {"address": "auto", "connect_timeout_s": waits}


@pytest.mark.parametrize(
    ("key", "text", "name"),
    [
        ("pretrain.data", "images.npz", "images.npz"),
        ("pretrain.data", "pets", "pets"),
        ("pretrain.data", "npz(path='images.npz', layout='NHWC')", "images.npz"),
        ("pretrain.data", "folder(path='pets')", "pets"),
        ("pipeline.prompts", "prompts.txt", "prompts.txt"),
        ("chain.kernel", "mine.py:Kernel(eta=0.5)", "mine.py"),
        ("reward_options.mine.weights", "./mine.py", "mine.py"),
        ("reward_options.mine.weights", "images.npz", "images.npz"),
        ("evaluation.metrics", "mine.py:sharp", "mine.py"),
    ],
)
def test_every_kind_of_file_that_settings_name_travels(here, key, text, name):
    made = inputs()
    said = made._value(key, text)
    there = moved(made.files, name)
    assert said == text.removeprefix("./").replace(name, there)
    assert all(content for content in made.files.values())


@pytest.mark.parametrize(
    "text",
    [
        "digits",
        "a red cat",
        "Cosine()",
        "DDIM(eta=1.0)",
        "http://127.0.0.1:8500",
        "clip_score",
        "",
        "hf(path='me/data')",
    ],
)
@pytest.mark.parametrize(
    "key", ["pretrain.data", "pipeline.prompts", "chain.kernel", "reward", "reward_options.mine.x"]
)
def test_a_text_that_is_no_file_stays(here, key, text):
    if key == "pretrain.data" and text not in ("digits", "", "hf(path='me/data')"):
        return
    made = inputs()
    assert made._value(key, text) == text
    assert not made.files


def test_a_table_travels_with_the_images_beside_it(here):
    made = inputs()
    said = made._value("pretrain.data", "list.csv")
    assert said == f"{moved(made.files, here.name)}/list.csv"
    assert {path.partition(f"/{here.name}/")[2] for path in made.files} >= {"list.csv", "pets/cat/a.png"}


def test_of_a_run_its_model_alone_travels(here):
    for name in ("model/model.json", "model/weights.safetensors", "checkpoints/step-1/big", "events.out"):
        (here / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "run" / name).write_bytes(b"x")
    made = inputs()
    assert made._value("base", "run") == moved(made.files, "model")
    assert {path.rpartition("/")[2] for path in made.files} == {"model.json", "weights.safetensors"}
    assert made._value("base", "stabilityai/sdxl-turbo") == "stabilityai/sdxl-turbo"


def test_what_the_nodes_share_is_left_there(here):
    made = inputs("/shared/runs", str(here))
    assert made._value("pretrain.data", "pets") == str(here / "pets")
    assert made._value("reward", "mine.py:brightness") == f"{here / 'mine.py'}:brightness"
    assert made._value("base", "/shared/runs/before/model") == "/shared/runs/before/model"
    assert not made.files


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("reward", "absent.py:score"),
        ("base", "runs/absent"),
        ("teacher", "/absent/run"),
        ("pretrain.autoencoder", "./absent"),
        ("pretrain.data", "absent"),
        ("reward_options.mine.weights", "/absent/w.safetensors"),
        ("reward", "mine.py:Score(weights='../absent.pt')"),
    ],
)
def test_a_file_that_is_not_there_is_named(here, key, text):
    with pytest.raises(ConfigError, match=r"absent.*does not exist") as caught:
        inputs()._value(key, text)
    assert "\n" not in str(caught.value)


def test_what_is_too_large_to_travel_says_where_it_belongs(here, monkeypatch):
    monkeypatch.setattr("rlfusion.jobs.launch.inputs.MOST_BYTES", 100)
    with pytest.raises(ConfigError, match=r"pretrain.data = .*images.npz.*--shared FOLDER"):
        inputs()._value("pretrain.data", "images.npz")


def test_the_same_content_has_the_same_place_and_other_content_another(here):
    first = inputs()._value("reward", "mine.py:brightness")
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "mine.py").write_text(REWARD)
    assert inputs()._value("reward", "elsewhere/mine.py:brightness") == first
    (here / "mine.py").write_text(f"{REWARD}# edited\n")
    assert inputs()._value("reward", "mine.py:brightness") != first


def test_a_link_back_to_above_is_not_followed(here):
    (here / "pets" / "again").symlink_to(here / "pets")
    made = inputs()
    made._value("pretrain.data", "pets")
    assert len(made.files) == 1


def test_a_module_of_the_users_own_does_not_travel_in_silence(here, monkeypatch):
    (here / "my_package_of_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ConfigError, match=r"module 'my_package_of_rewards' .* does not travel: expected path/to/file"):
        order("--reward", "my_package_of_rewards:brightness")
    for settings in ({"packages": ["my-package"]}, {"env": "none"}):
        assert held(order("--reward", "my_package_of_rewards:brightness", **settings))["reward"]
    assert order("--agent.optimizer", "torch.optim:SGD"), "torch is a library, which the environment brings"


@pytest.mark.parametrize("root", ["runs", "./runs", "."])
def test_a_root_in_the_jobs_working_directory_is_refused(root):
    with pytest.raises(ConfigError, match=r"root = .*storage that the nodes share, or of the head node's own disk"):
        new_order(Launch(), "finetune", settings_of("finetune", ["--root", root]), lambda _: None)


def test_launch_has_no_setting_that_a_command_has_too():
    own = {field.name for field in fields(Launch)}
    for command in RESUMABLE:
        assert not own & {name.partition(".")[0] for name in command_trees()[command].names()}, command


def test_options_are_divided_and_follow_may_stand_alone():
    own, rest = launching._divided(
        ["--updates", "3", "--follow", "--name=x", "--env", "none", "--reward", "ink"], [f.name for f in fields(Launch)]
    )
    assert own == ["--follow=true", "--env=none"]
    assert rest == ["--updates=3", "--name=x", "--reward=ink"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "container"}, "expected --image NAME"),
        ({"image": "x"}, "expected --env container"),
        ({"env": "none", "packages": ["x"]}, "expected --env pip or uv"),
        ({"python": " "}, "expected the Python with Ray"),
        ({"stop_s": 0}, "stop_s = 0"),
        ({"restarts": -1}, "restarts = -1"),
        ({"timeout_s": float("nan")}, "timeout_s"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Launch(**settings)


ADDRESSES = {
    "http://head:8265": "http://head:8265",
    "https://rl.example.org": "https://rl.example.org",
    "http://[::1]:8265/": "http://[::1]:8265",
    "head:8265": "http://head:8265",
    "": "http://127.0.0.1:8265",
}


@pytest.mark.parametrize("given", ADDRESSES)
def test_addresses_are_read(given, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")  # Ray's own client would take this one
    assert cluster.address_of(Jobs(address=given)) == ADDRESSES[given]


def test_without_an_address_the_environments_is_taken(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265")
    assert cluster.address_of(Jobs()) == "http://10.0.0.1:8265"


@pytest.mark.parametrize(
    "given",
    [
        "ray://head:10001",
        "http://head:port",
        "http://head:99999",
        "http://",
        "ftp://head",
        "http://head/path",
        "he ad:1",
    ],
)
def test_what_is_no_address_is_refused_with_what_is_one(given):
    with pytest.raises(ConfigError, match=r"such as http://head:8265"):
        cluster.address_of(Jobs(address=given))


def test_an_address_where_nothing_is_ends_with_69_in_one_line(here, capsys):
    asked = ["--address", "http://127.0.0.1:1", "--timeout_s", "5"]
    assert main(["launch", "finetune", "--root", "/shared/runs", *asked]) == 69
    assert main(["jobs", "list", *asked]) == 69
    lines = capsys.readouterr().err.splitlines()
    assert [
        line.startswith("rlfusion: unavailable: no Ray dashboard answers at http://127.0.0.1:1") for line in lines
    ] == [True] * 2


def test_a_private_cluster_leaves_nothing_of_its_token(tmp_path, capsys):
    with ray_cluster._private_environment(tmp_path, 5):
        pass
    assert main(["jobs", "list", "--address", "http://127.0.0.1:1", "--timeout_s", "5"]) == 69
    assert capsys.readouterr().err.startswith("rlfusion: unavailable: no Ray dashboard answers")


def test_a_port_that_accepts_and_says_nothing_is_given_up_at_the_deadline(capsys):
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as server:
        begin = time.monotonic()
        assert main(["jobs", "list", "--address", f"127.0.0.1:{server.getsockname()[1]}", "--timeout_s", "0.5"]) == 69
    assert time.monotonic() - begin < 20
    assert "did not answer within timeout_s = 0.5 s" in capsys.readouterr().err


@pytest.fixture
def ray(monkeypatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(cluster, "_client", lambda *_: fake)
    return fake


def read(submitted) -> tuple[dict, set[str]]:
    """The order, and the names of what travels."""
    archive = zipfile.ZipFile(io.BytesIO(submitted.archive))
    return json.loads(archive.read(arrival.FILE)), set(archive.namelist())


def test_a_job_has_the_runs_name_and_takes_this_very_rlfusion_along(here, ray):
    _, job = submit(Launch(env="none", stop_s=12.5), order("--reward", "mine.py:brightness", "--name", "it"))
    (sent,) = ray.submitted
    told, names = read(sent)
    assert (job.name, job.id, job.attempt) == ("it", "it", 1)
    assert sent.entrypoint == "python -m rlfusion.jobs.launch.arrival finetune /shared/runs/it"
    assert sent.environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "13"}
    assert {"rlfusion/agents/ddpo.py", "rlfusion/rewards/ink.py", "config.yaml", "order.json"} <= names
    assert told["folder"] == "/shared/runs/it"
    assert told["version"] == __version__


def test_a_name_is_taken_once(here, ray):
    submit(Launch(env="none"), order("--name", "it"))
    with pytest.raises(
        ConfigError, match=r"name = 'it': a job of that name is .* already \(running\), .* jobs resume it"
    ):
        submit(Launch(env="none"), order("--name", "it"))
    names = [submit(Launch(env="none"), order(), named=False)[1].name for _ in range(3)]
    assert names == ["ddpo-class_logprob-seed0", "ddpo-class_logprob-seed0-2", "ddpo-class_logprob-seed0-3"]


@pytest.mark.parametrize("name", ["it/2", "it~2", "-it", "", "a b", "x" * 201])
def test_a_name_that_a_job_cannot_have_is_refused(name):
    with pytest.raises(ConfigError, match="name = "):
        cluster.require_name(name)


def test_a_job_is_resumed_as_it_was_launched(here, ray):
    submit(Launch(env="uv", packages=["left-pad"], restarts=7), order("--name", "it"))
    with pytest.raises(ConfigError, match=r"job 'it' is running: expected rlfusion jobs stop it first"):
        resume(Jobs(), "it", [], False)
    ray.details[0].status = "STOPPED"
    for attempt in (2, 3):
        _, job = resume(Jobs(), "it", ["updates=9"], False)
        told, names = read(ray.submitted[-1])
        assert (job.name, job.id, job.attempt) == ("it", f"it~{attempt}", attempt)
        assert (told["attempt"], told["changes"], told["supervise"]["restarts"]) == (attempt, ["updates=9"], 7)
        assert "left-pad" in ray.submitted[-1].environment["uv"]["packages"]
        assert "config.yaml" not in names
        ray.details[-1].status = "FAILED"
    ray.details[-1].status = "SUCCEEDED"
    with pytest.raises(ConfigError, match="job 'it' is done: expected --change KEY=VALUE"):
        resume(Jobs(), "it", [], False)


def test_a_job_that_is_not_there_is_named_with_the_nearest(ray):
    ray.add("other", ours=False)
    ray.add("digits")
    with pytest.raises(ConfigError, match=r"unknown job at .* 'digit': expected one of digits; did you mean 'digits'"):
        cluster.Cluster(Jobs()).job("digit")


def test_a_job_is_listed_followed_stopped_and_resumed(here, ray, capsys):
    """Each word of ``rlfusion jobs``, and a launch that is followed to its end."""
    assert main(["launch", "finetune", "--name", "it", "--root", "/shared/runs", "--env", "none", "--follow"]) == 0
    *_, job, run, see, stop, line, end = capsys.readouterr().out.splitlines()
    assert (line, end) == ("a line", "job it: succeeded")
    assert (see, stop) == ("see it: rlfusion jobs status it", "stop it: rlfusion jobs stop it")
    assert run.endswith(": /shared/runs/it")
    assert max(map(len, (job, run, see, stop))) <= 80
    ray.details[0].status = "RUNNING"
    for words, code, said in (
        (["list"], 0, "it"),
        (["status", "it"], 0, "/shared/runs/it"),
        (["logs", "it"], 0, "a line"),
        (["resume", "it"], 2, "job 'it' is running"),
        (["stop", "it"], 0, "go on with: rlfusion jobs resume it"),
        (["stop", "it"], 2, "job 'it' has ended already: stopped"),
        (["resume", "it", "--follow"], 0, "goes on with its run\n/shared/runs/it"),
        (["status", "its"], 2, "did you mean 'it'?"),
    ):
        assert main(["jobs", *words]) == code, words
        assert said in "".join(capsys.readouterr()), words


@pytest.mark.parametrize(("state", "code", "expected"), [("FAILED", 4, 4), ("FAILED", None, 1), ("STOPPED", None, 75)])
def test_what_follows_a_job_ends_with_its_exit_code(here, ray, state, code, expected):
    ray.add("it", state)
    ray.details[0].driver_exit_code = code
    assert main(["jobs", "logs", "it", "--follow"]) == expected


def test_a_connection_that_breaks_is_made_again_and_nothing_is_shown_twice(ray):
    """The log is told from its beginning each time."""
    ray.add("it")
    told = iter(
        [
            ["one ", "tw", ConnectionResetError()],
            ["one two ", "three ", RuntimeError("closed")],
            ["one two three ", "four"],
        ]
    )

    async def tail(id):
        for text in next(told):
            if isinstance(text, Exception):
                raise text
            yield text
        ray.details[0].status = "SUCCEEDED"

    ray.tail_job_logs, ray.get_job_logs = tail, lambda id: "one two three four!"
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "POLL_S", 0.0)
        at = cluster.Cluster(Jobs())
        assert at.follow(at.job("it"), shown.append).state == "SUCCEEDED"
    assert "".join(shown) == "one two three four!"


def test_a_run_of_another_cluster_is_resumed_by_its_folder(here, ray, capsys):
    asked = ["launch", "finetune", "--resume", "/shared/runs/it", "--change", "updates=9", "--env", "none"]
    assert main(asked) == 0
    told, _ = read(ray.submitted[0])
    assert (told["folder"], told["attempt"], told["changes"]) == ("/shared/runs/it", 2, ["updates=9"])
    assert main([*asked[:3], "runs/it"]) == 2
    assert "expected the absolute path that it has on the cluster" in capsys.readouterr().err


def test_the_libraries_are_those_of_the_wheel_but_ray(here):
    needed = environment.requirements(["clip"])
    assert any(one.startswith("torch>=") for one in needed)
    assert any(one.startswith("open-clip-torch") for one in needed)
    assert not any(one.partition(">")[0].partition("[")[0] == "ray" for one in needed)
    assert not any(one.startswith(("pytest", "ruff", "peft")) for one in needed)
    with pytest.raises(ConfigError, match=r"unknown extra 'clipp'.*did you mean 'clip'"):
        environment.requirements(["clipp"])


@pytest.mark.parametrize("env", ["pip", "uv"])
def test_ray_itself_takes_the_runtime_environment(tmp_path, env):
    from ray.runtime_env import RuntimeEnv

    made = environment.runtime_env(Launch(env=env), order().told(Launch(), 1), {}, tmp_path)
    packages = RuntimeEnv(**{**made, "working_dir": "gcs://x.zip"})[env]["packages"]
    assert packages == environment.requirements([])


def test_a_container_gets_its_order_in_a_variable_and_sees_the_root(here, tmp_path):
    from ray.runtime_env import RuntimeEnv

    settings = Launch(env="container", image="me/rlfusion:1", shared=["/data"])
    made = order("--reward", "mine.py:brightness")
    held = environment.runtime_env(settings, made.told(settings, 1), made.files, tmp_path)
    assert RuntimeEnv(**held)["container"] == {
        "image": "me/rlfusion:1",
        "run_options": ["-v", "/shared/runs:/shared/runs", "-v", "/data:/data"],
    }
    assert len(held["env_vars"][arrival.VARIABLE]) < environment.MOST_IN_VARIABLE
    with pytest.raises(ConfigError, match="KiB of files would have to travel into a container"):
        environment.runtime_env(settings, {}, {"x": np.random.default_rng(0).bytes(100_000)}, tmp_path)


def test_the_same_files_pack_to_the_same_bytes():
    assert environment.packed({"b": b"2", "a": b"1"}) == environment.packed({"a": b"1", "b": b"2"})


def test_every_file_of_a_wheel_has_its_digest_in_the_record():
    files = wheel.files()
    (record,) = [path for path in files if path.endswith(".dist-info/RECORD")]
    assert {line.split(",")[0] for line in files[record].decode().splitlines()} == set(files)


def place(folder: Path, root: Path, attempt: int = 1, **changed) -> Path:
    """A job's working directory on the head node."""
    (folder / "inputs" / "0123").mkdir(parents=True)
    (folder / "inputs" / "0123" / "mine.py").write_text(REWARD)
    (folder / "config.yaml").write_text("seed: 3\n")
    told = {"version": __version__, "command": "finetune", "folder": str(root / "it"), "attempt": attempt}
    told |= {"changes": ["updates=9"], "supervise": {"restarts": 2}} | changed
    (folder / arrival.FILE).write_text(json.dumps(told))
    return folder


def test_what_arrives_is_kept_and_becomes_a_supervised_run(tmp_path):
    root = tmp_path / "runs"
    kept = root / "cache" / "launched" / "it.yaml"
    new = ["supervise", "--restarts", "2", "--", "finetune", "--config", str(kept)]
    assert arrival.prepare(place(tmp_path / "1", root)) == new
    assert (root / "cache" / "inputs" / "0123" / "mine.py").read_text() == REWARD
    assert arrival.prepare(place(tmp_path / "2", root, attempt=2)) == new, "it had not begun when it was stopped"
    (root / "it").mkdir()
    (root / "it" / "config.yaml").touch()
    resumed = ["finetune", "--resume", str(root / "it"), "--change", "updates=9"]
    assert arrival.prepare(place(tmp_path / "3", root, attempt=2))[-5:] == resumed
    with pytest.raises(ConfigError, match=r"is there already: expected another --name, or --resume"):
        arrival.prepare(place(tmp_path / "4", root))


def test_what_cannot_arrive_says_so(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"the job was launched by 9\.9: expected the same version"):
        arrival.prepare(place(tmp_path / "1", tmp_path, version="9.9"))
    with pytest.raises(ConfigError, match="no run is there on the head node"):
        arrival.prepare(place(tmp_path / "2", tmp_path / "runs", attempt=2))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        arrival.prepare(place(tmp_path / "3", tmp_path / "file"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="has no Ray, or no torch: expected --python PATH"):
        arrival.prepare(place(tmp_path / "4", tmp_path / "runs"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs", "statu", "x"], "did you mean 'status'?"),
        (["jobs", "status"], "expected rlfusion jobs status NAME"),
        (["jobs", "list", "x"], "'x' stands without an option"),
        (["jobs", "stop", "x", "--follow"], "expected rlfusion jobs stop NAME and options"),
        (["jobs", "resume", "x", "--change", "updates"], "expected rlfusion jobs resume NAME and options"),
        (["jobs", "list", "--adress", "x"], "did you mean 'address'?"),
        (["launch"], "expected a command that makes a run"),
        (["launch", "--follow"], "expected a command that makes a run"),
        (["launch", "evaluate"], "unknown command that makes a run 'evaluate'"),
        (["launch", "finetune", "--rewrd", "ink"], "did you mean 'reward'?"),
        (["launch", "finetune", "--env", "conda"], "one of 'pip', 'uv', 'container', 'none'"),
    ],
)
def test_a_slip_is_refused_in_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


YOUNG = "Request failed with status code 500: No available agent to submit job, please try again later.."


@pytest.mark.parametrize(
    ("said", "times", "patience", "ends"), [(YOUNG, 3, 30, ""), (YOUNG, 99, 0.1, "No available"), ("odd", 1, 30, "odd")]
)
def test_a_cluster_that_has_just_begun_is_asked_again(ray, monkeypatch, said, times, patience, ends):
    """As long as it asks for that; what else goes wrong is told at once."""
    taken, asked = ray.submit_job, []

    def young(**given):
        asked.append(given)
        if len(asked) <= times:
            raise RuntimeError(said)
        taken(**given)

    monkeypatch.setattr(ray, "submit_job", young)
    monkeypatch.setattr(cluster, "POLL_S", 0.02)
    at = cluster.Cluster(Jobs(timeout_s=patience))
    about = {"version": "0", "command": "finetune", "launch": "{}"}
    if not ends:
        assert at.submit("it", 1, "true", {}, about).state == "RUNNING"
        assert len(asked) == times + 1
        return
    with pytest.raises(UnavailableError, match=f"refused: .*{ends}"):
        at.submit("it", 1, "true", {}, about)
    assert (len(asked) == 1) == (ends == "odd")
