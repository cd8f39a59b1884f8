"""Packages that stand in for wandb, trackio and mlflow: their published signatures, and a list of what they hear."""

from pathlib import Path

WANDB = """
CALLS = []


class Image:
    def __init__(self, data_or_path, mode=None, caption=None, grouping=None):
        self.shape, self.caption = data_or_path.shape, caption


class Settings:
    def __init__(self, console="auto", silent=False):
        self.console = console


class Held(dict):
    def update(self, d, allow_val_change=None):
        dict.update(self, d)


class Run:
    def __init__(self, id):
        self.id, self.offline, self.config, self.summary = id or "made-by-wandb", True, Held(), Held()

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        CALLS.append(("define_metric", name, step_metric))

    def log(self, data, step=None, commit=None):
        CALLS.append(("log", data, step))

    def finish(self, exit_code=None):
        CALLS.append(("finish", exit_code, dict(self.summary), dict(self.config)))


def login(key=None, relogin=None, host=None, force=None, timeout=None, verify=True, referrer=None, prompt=True):
    raise RuntimeError("No API key configured. Use `wandb login` to log in.")


def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
         config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
         mode=None, force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None,
         tensorboard=None, sync_tensorboard=None, monitor_gym=None, settings=None, anonymous=None):
    CALLS.append(("init", dict(project=project, dir=dir, id=id, name=name, tags=tags, config=config, resume=resume)))
    return Run(id)
"""

TRACKIO = """
CALLS = []


class Image:
    def __init__(self, value, caption=None):
        assert value.dtype == "uint8" and value.shape[2] == 3
        self.caption = caption


class Markdown:
    def __init__(self, text=""):
        self.text = text


class Run:
    def __init__(self, name):
        self.name = name

    def log(self, metrics, step=None):
        CALLS.append(("log", metrics, step))

    def finish(self):
        CALLS.append(("finish",))


def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
         resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
         auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):
    CALLS.append(("init", dict(project=project, name=name, config=config, resume=resume)))
    return Run(name)
"""

MLFLOW = """
from types import SimpleNamespace as Bag

CALLS = []
EXPERIMENTS = {}


class MlflowClient:
    def __init__(self, tracking_uri=None, registry_uri=None):
        self.tracking_uri = tracking_uri or "default"

    def get_experiment_by_name(self, name):
        return EXPERIMENTS.get(name)

    def create_experiment(self, name, artifact_location=None, tags=None):
        EXPERIMENTS[name] = Bag(experiment_id="7")
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        CALLS.append(("create_run", experiment_id, run_name))
        return Bag(info=Bag(run_id="made-by-mlflow"))

    def update_run(self, run_id, status=None, name=None):
        CALLS.append(("update_run", run_id, status))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert len(metrics) <= 1000 and len(params) <= 100
        for one in [*metrics, *params]:
            assert set(one.key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. /"), one.key
        CALLS.append(("log_batch", [(m.key, m.value, m.step) for m in metrics], [(p.key, p.value) for p in params]))

    def log_text(self, run_id, text, artifact_file):
        CALLS.append(("log_text", artifact_file, text))

    def log_dict(self, run_id, dictionary, artifact_file):
        CALLS.append(("log_dict", artifact_file, dictionary))

    def log_image(self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=None):
        assert image.dtype == "uint8" and image.ndim == 3
        CALLS.append(("log_image", key, step))

    def set_terminated(self, run_id, status=None, end_time=None):
        CALLS.append(("set_terminated", run_id, status))
"""

ENTITIES = """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step


class Param:
    def __init__(self, key, value):
        self.key, self.value = key, value
"""

FILES = {
    "wandb.py": WANDB,
    "trackio.py": TRACKIO,
    "mlflow/__init__.py": MLFLOW,
    "mlflow/entities.py": ENTITIES,
}


def write(folder: Path) -> None:
    """Put the packages into a folder, from which they are imported."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


RECORDER = '''
import json
from pathlib import Path

from rlfusion.training.trackers import Opened


class Recorder:
    """What it is told, a line each."""

    def __init__(self, file: str = "told.jsonl", breaks: str = "", missing: bool = False):
        self.file, self.breaks, self.missing = Path(file), breaks, missing

    def tell(self, what, *told):
        if what == self.breaks:
            raise OSError("the server is gone")
        with self.file.open("a") as file:
            file.write(json.dumps([what, *told]) + "\\n")

    def check(self):
        if self.missing:
            raise ImportError("no module named 'recorder'")

    def begin(self, run):
        self.tell("begin", run.resume, run.config.get("agent.name", ""))
        return Opened("number one", "a shelf")

    def scalars(self, at, values):
        self.tell("scalars", list(at), values)

    def image(self, at, name, picture, prompts):
        self.tell("image", list(at), name, picture.shape, prompts)

    def text(self, name, text):
        self.tell("text", name)

    def summary(self, values):
        self.tell("summary", values)

    def finish(self, status):
        self.tell("finish", status)
'''
