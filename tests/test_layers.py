"""The rooms of the house: imports run one way between them, in no circle inside one, and a library stays in its room.

The source of every module is read, and whatever would bend the order is named.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
from house import MODULES

FLOORS = [
    "common",
    "data diffusion training",
    "nets objectives",
    "models evaluation",
    "rewards pretrain",
    "envs",
    "rollout",
    "rl distill",
    "agents",
    "config",
    "jobs",
    "cli",
]
"""Each room imports from floors below its own, from the ground up."""

FLOOR = {name: depth for depth, line in enumerate(FLOORS) for name in line.split()}
ROOT_MODULES = 5

HOMES = {
    "ray": {"rlfusion.rollout.ray_backend", "rlfusion.rollout.ray_cluster", "rlfusion.rollout.ray_rewards"}
    | {"rlfusion.rollout.ray_ranks", "rlfusion.rollout.ray_placement", "rlfusion.rollout.ray_kept"}
    | {"rlfusion.rollout.ray_head", "rlfusion.rollout.ray_hosts"}
    | {"rlfusion.rollout.ray_stacks", "rlfusion.rollout.ray_worker", "rlfusion.jobs.launch.cluster"},
    **{library: {"rlfusion.jobs.launch.cluster"} for library in ("requests", "aiohttp")},
    "packaging": {"rlfusion.jobs.launch.environment"},
    "torch.utils.tensorboard": {"rlfusion.training.tracking"},
    "tensorboard": {"rlfusion.training.tracking", "rlfusion.jobs.board", "rlfusion.jobs.board_columns"},
    "gymnasium": {"rlfusion.envs", "rlfusion.envs.denoising", "rlfusion.envs.interface", "rlfusion.envs.single"}
    | {"rlfusion.rollout.task"},
    "sklearn": {"rlfusion.data.dataset"},
    "datasets": {"rlfusion.data.hub"},
    "pyarrow": {"rlfusion.data.columns", "rlfusion.models.pipelines.prompt_files"},
    "matplotlib": {"rlfusion.jobs.push", "rlfusion.jobs.compare.plots"},
    "jsonargparse": {"rlfusion.cli.arguments"},
    "rich": {"rlfusion.cli.shown", "rlfusion.cli.tables", "rlfusion.common.progress"},
    "PIL": {"rlfusion.data.images", "rlfusion.training.tracking", "rlfusion.rewards.adapters", "rlfusion.rewards.jpeg"}
    | {"rlfusion.rewards.kit.lpips_likeness.scorer", "rlfusion.rewards.kit.object_checks.scorer"},
    "yaml": {"rlfusion.cli.settings_text", "rlfusion.config", "rlfusion.cli.arguments", "rlfusion.jobs.resuming"}
    | {"rlfusion.jobs.launch.job", "rlfusion.jobs.push", "rlfusion.jobs.imports.job", "rlfusion.jobs.imports.reading"},
    "torch_fidelity": {"rlfusion.evaluation.extractors"},
    "peft": {"rlfusion.models.lora", "rlfusion.models.pipelines.adapters", "rlfusion.models.pipelines.export"},
    "bitsandbytes": {"rlfusion.training.optimizers.eight_bits", "rlfusion.models.pipelines.quantized"},
    "torchao": {"rlfusion.models.pipelines.quantized"},
    **{name: {f"rlfusion.training.trackers.to_{name}"} for name in ("wandb", "trackio", "mlflow")},
    "lpips": {"rlfusion.pretrain.metrics"},
    "starlette": {"rlfusion.rewards.remote.server"},
    "uvicorn": {"rlfusion.jobs.serve_reward"},
    "urllib3": {"rlfusion.rewards.remote.transport"},
    "transformers": {"rlfusion.models.pipelines.hub", "rlfusion.models.pipelines.lengths"},
    "diffusers": {"rlfusion.models.autoencoder", "rlfusion.models.pipelines.hub"},
    "rapidocr_onnxruntime": {"rlfusion.rewards.ocr_accuracy"},
    "open_clip": {"rlfusion.rewards.clip.towers"},
    **{name: set() for name in ("stable_baselines3", "scipy")},
    **{name: set() for name in ("tensorflow", "pickle")},
}
"""The only modules that may import a library."""


class Import(NamedTuple):
    """One imported module; ``lazy`` within a function, ``typing`` only for the type checker."""

    target: str
    lazy: bool


@cache
def imports(module: str) -> tuple[Import, ...]:
    """What a module imports; ``from package import name`` is the submodule where there is one."""
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text())
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (Import(name if name in MODULES else node.module, node in lazy) for name in names)


def room(module: str) -> str:
    """The room that a module stands in; the public face, at the root of the house, stands in none."""
    top = module.split(".")[1]
    return top if top in FLOOR else ""


def ours(module: str) -> list[Import]:
    return [i for i in imports(module) if i.target.startswith("rlfusion.")]


def test_every_folder_is_a_room_and_few_modules_stand_in_none():
    assert {m.split(".")[1] for m in MODULES if m.count(".") > 1} <= set(FLOOR)
    assert set(FLOOR) <= {room(m) for m in MODULES if m != "rlfusion"}
    assert len(FLOOR) == sum(len(line.split()) for line in FLOORS)
    outside = [m for m in MODULES if m == "rlfusion" or not room(m)]
    assert len(outside) <= ROOT_MODULES, outside


@pytest.mark.parametrize("module", [m for m in MODULES if m != "rlfusion" and room(m)])
def test_imports_run_one_way(module):
    wrong = [
        i.target
        for i in ours(module)
        if room(i.target) != room(module) and FLOOR.get(room(i.target), len(FLOORS)) >= FLOOR[room(module)]
    ]
    assert not wrong, f"{module} (floor {FLOOR[room(module)]}) imports {wrong}"


def test_there_are_no_cycles_even_through_functions():
    graph = {m: {i.target for i in imports(m) if i.target in MODULES and i.target != m} for m in MODULES}
    for m in MODULES:
        package = m.rpartition(".")[0]
        graph[m].discard(package) if m != "rlfusion" else None
    while leaves := [m for m, targets in graph.items() if not targets & graph.keys()]:
        for m in leaves:
            del graph[m]
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_room(library):
    found = {m for m in MODULES for i in imports(m) if f"{i.target}.".startswith(f"{library}.")}
    assert found <= HOMES[library]
    assert not HOMES[library] or found, f"no module imports {library}: is the list still right?"


def test_agents_do_not_import_agents():
    agents = [m for m in MODULES if m.startswith("rlfusion.agents.")]
    assert agents
    assert not [(m, i.target) for m in agents for i in ours(m) if i.target in agents]


def test_the_top_folders_are_never_imported_by_their_bare_names():
    bare = {"envs", "rewards", "agents"}
    assert not [(m, i.target) for m in MODULES for i in imports(m) if i.target.split(".")[0] in bare]


def test_heavy_libraries_are_loaded_only_where_they_are_used():
    at_import = {i.target.split(".")[0] for m in MODULES for i in imports(m) if not i.lazy and ".ray_" not in m}
    assert not at_import & {"ray", "tensorboard", "sklearn", "jsonargparse"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.alone
def test_importing_rlfusion_is_quick_and_loads_nothing():
    code = (
        "import sys, time; begin = time.process_time(); import rlfusion; taken = time.process_time() - begin\n"
        "print(taken, *sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'gymnasium', 'ray'}))"
    )
    taken, *loaded = min((run_python(code).split() for _ in range(3)), key=lambda words: float(words[0]))
    assert loaded == []
    assert float(taken) < 0.2


def test_refusing_a_command_and_the_guide_need_no_torch():
    code = (
        "import sys; from rlfusion.cli.main import main; codes = main(['fintune']), main(['--help'])\n"
        "print(codes, 'torch' in sys.modules)"
    )
    assert run_python(code).splitlines()[-1] == "(2, 0) False"
