"""Command lines and configurations that cannot work: one line and code 2, or exactly the settings that were written.

``rlfusion.cli.main`` is called as it is, but what checks and runs the jobs only notes the settings that it gets; so
hundreds of lines take seconds. The broken values are made from the settings' own tree: a new setting is tried, too.
"""

import contextlib
import functools
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import yaml

from rlfusion import config, distill
from rlfusion.agents import AGENTS
from rlfusion.cli import arguments, foreign, main, tables
from rlfusion.cli.settings_tree import command_trees, tree
from rlfusion.common.annotations import kinds
from rlfusion.jobs import compare, finetune, pretrain, pretrain_autoencoder, runs, train_clip
from rlfusion.jobs import distill as distilling

NEEDED = {
    "sample": ("--checkpoint", "x"),
    "evaluate": ("--checkpoint", "x"),
    "check-agent": ("grpo",),
    "check-model": ("x",),
    "reproduce": ("x",),
    "check-reward": ("ink",),
    "serve-reward": ("ink",),
}
LONGEST = 420
REFUSED = object()


class Said(NamedTuple):
    """What a command line came to: the exit code, what was printed, and the settings that would have run."""

    code: int
    out: str
    err: str
    settings: Any


@pytest.fixture(scope="module")
def typed() -> Iterator[Callable[..., Said]]:
    """``typed(*words)``: the command line up to where work begins."""
    with pytest.MonkeyPatch.context() as patch:
        begun: list[Any] = []
        for module in (finetune, compare, pretrain, distilling, pretrain_autoencoder, train_clip):
            patch.setattr(module, "check", lambda settings: None)
        patch.setattr(runs, "new_run", lambda kind, settings, name: contextlib.nullcontext((settings, None)))
        for name in [name for name in vars(tables) if name.startswith("run_")]:
            patch.setattr(tables, name, lambda settings, folder=None: begun.append(settings))
        patch.setattr(config, "with_agent", functools.cache(config.with_agent))
        patch.setattr(config, "with_method", functools.cache(config.with_method))
        patch.setattr(arguments, "model_defaults", lambda *about: {})
        made, make = {}, arguments.make_parser

        def parser(settings: type, command: str, defaults: dict) -> Any:
            key = (settings, command, repr(defaults))
            made[key] = made.get(key) or make(settings, command, defaults)
            return made[key]

        patch.setattr(arguments, "make_parser", parser)

        def run(*words: str) -> Said:
            begun.clear()
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = main.main(list(words))
                except SystemExit as ended:  # of --help
                    code = int(ended.code or 0)
            return Said(code, out.getvalue(), err.getvalue(), begun[-1] if begun else None)

        yield run


def require_refused(said: Said, *parts: str) -> None:
    """Code 2, one short line with these parts, nothing printed and nothing begun."""
    assert said.code == 2, said
    assert (said.out, said.settings) == ("", None), said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("rlfusion: "), said.err
    assert len(said.err) <= LONGEST, said.err
    assert all(part in said.err for part in parts), said.err


def variants() -> dict[str, tuple[tuple[str, ...], Any]]:
    """Of each command, and of each agent and method: the words that begin it, and its settings' tree."""
    made = {name: ((name, *NEEDED.get(name, ())), known) for name, known in command_trees().items()}
    made |= {f"finetune {a}": (("finetune", "--agent", a), tree(config.with_agent(a))) for a in AGENTS}
    made |= {f"distill {m}": (("distill", "--method", m), tree(config.with_method(m))) for m in distill.METHODS}
    return made


BROKEN = (
    "many",
    "nan",
    ".nan",
    "inf",
    "-.inf",
    "1e999",
    "9" * 30,
    "",
    "[1, x]",
    "{a: 1}",
    "true",
    "null",
    "1.5",
    "1:30",
)


def meant(text: str, annotation: Any) -> Any:
    """What a text says under an annotation; REFUSED where it can say nothing. Written apart from the product."""
    allowed = kinds(annotation)
    if str in allowed:
        return text if "{" not in text else REFUSED
    if get_origin(annotation) is Literal:
        return text if text in get_args(annotation) else REFUSED
    if text == "null":
        return None if type(None) in allowed else REFUSED
    if text in ("true", "false"):
        return text == "true" if bool in allowed else REFUSED
    if re.fullmatch(r"-?\d{1,18}", text) and (int in allowed or float in allowed):
        return int(text)
    if re.fullmatch(r"-?[\d.]+(e-?\d{1,2})?", text) and float in allowed:
        return float(text)
    return REFUSED


@pytest.mark.parametrize("variant", variants())
def test_no_setting_becomes_what_it_is_not(variant, typed):
    begin, known = variants()[variant]
    whole = " " not in variant
    tried = 0
    for key, annotation in known.leaves.items():
        if not whole and not key.startswith(("agent.", "method.")):
            continue  # as of the command itself
        if get_origin(annotation) in (list, tuple, dict) or str in kinds(annotation) or key.endswith(".name"):
            continue
        for text in BROKEN:
            if meant(text, annotation) is REFUSED:
                require_refused(typed(*begin, f"--{key}={text}"), key.rpartition(".")[2])
                tried += 1
    assert tried > (10 if whole else 0)


EDGES = ("-1", "0", "0.5", "1", "4611686018427387", "1e-30", "1e30", "null", "true", "false", "x y", "ü", "'x'", "#")


@pytest.mark.parametrize("variant", command_trees())
def test_what_is_taken_is_what_was_written(variant, typed):
    begin, known = variants()[variant]
    draw = random.Random(variant)
    names = [key for key in known.leaves if key.partition(".")[0] not in (begin[1][2:] if len(begin) > 1 else "",)]
    for key in draw.sample(names, min(12, len(names))):
        annotation = known.leaves[key]
        if get_origin(annotation) in (list, tuple, dict) or key in (
            "bundle",
            "checkpoint",
            "model",
            "reward",
            "agent",
            "agent.name",
        ):
            continue
        text = draw.choice([edge for edge in EDGES if meant(edge, annotation) is not REFUSED] or ["0"])
        said = typed(*begin, f"--{key}={text}")
        if said.code != 0:
            require_refused(said)
            continue
        value: Any = said.settings
        for name in key.split("."):
            value = getattr(value, name)
        assert value == meant(text, annotation), key
        assert not isinstance(value, bool) or text in ("true", "false"), key
        assert said.err == ""


def damaged(seed: int, text: str) -> bytes:
    """A configuration that something happened to."""
    draw = random.Random(seed)
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    name, _, value = lines[at].partition(":")
    words = ["null", "[1, 2]", "{a: 1}", "~", "yes", ".nan", "-.inf", "1e999", "0x1g", "'", '"', "&a [*a]", "!!set {a}"]
    kinds_of_damage: list[Callable[[], list[str]]] = [
        lambda: [*lines[:at], f"{name}: {draw.choice(words)}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{name}x: {value}", *lines[at + 1 :]],
        lambda: [*lines[: at + 1], *lines[at:]],
        lambda: [*lines[:at], f"{name}{value}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{draw.choice('?-@`%,')} {lines[at]}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"   {lines[at]}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"\t{lines[at]}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{lines[at]} [", *lines[at + 1 :]],
        lambda: ["- a", *lines],
        lambda: [*lines, "---", *lines],
    ]
    content = "\n".join(draw.choice(kinds_of_damage)()).encode()
    if draw.random() < 0.3:
        place = draw.randrange(len(content))
        content = content[:place] + bytes([draw.choice((0, 1, 27, 128, 195, 255))]) + content[place + 1 :]
    return content


def test_a_damaged_configuration_is_refused_or_read_as_it_stands(typed, tmp_path):
    whole, refused = config.to_yaml(config.Finetune()), 0
    file = tmp_path / "config.yaml"
    for seed in range(150):
        file.write_bytes(damaged(seed, whole))
        said = typed("finetune", "--config", str(file))
        if said.code != 0:
            require_refused(said)
            refused += 1
            continue
        read, written = asdict(said.settings), yaml.safe_load(file.read_text())
        assert json.loads(json.dumps(read)) == json.loads(json.dumps(merged(read, written))), seed
    assert refused > 75


def merged(read: dict, written: dict) -> dict:
    """``read`` with all that is ``written`` in its place; a name alone is a list of one."""
    out = dict(read)
    for name, value in written.items():
        assert name in read
        inner = (
            isinstance(value, dict) and isinstance(read[name], dict) and name not in ("reward_options", "reward_envs")
        )
        out[name] = merged(read[name], value) if inner else value
    return out


def bomb() -> str:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(rows)


FILES = {
    "empty": (b"", "is empty"),
    "only a comment": (b"# nothing\n", "is empty"),
    "a list": (b"- 1\n- 2\n", "expected a mapping"),
    "a word": (b"hello", "expected a mapping"),
    "not UTF-8": ("name: \xe9".encode("latin-1"), "UTF-8"),
    "UTF-16": ("seed: 1".encode("utf-16"), "UTF-8"),
    "a zero byte": (b"seed: 1\x00", "no YAML"),
    "broken": (b"seed: [1\nupdates: }", "line 2"),
    "a tab": (b"chain:\n\tsteps: 3", "line 2"),
    "a key twice": (b"seed: 1\nseed: 2", "'seed' is there twice"),
    "a key twice inside": (b"agent: {lr: 1, lr: 2}", "'lr' is there twice"),
    "aliases without end": (bomb().encode(), "aliases"),
    "a list in itself": (b"a: &a [*a]", "aliases"),
    "too deep": (b"a: " + b"[" * 5000 + b"]" * 5000, "too deep"),
    "too large": (b"#" * (2**20 + 1), "bytes"),
    "a group that is null": (b"pipeline: null", "pipeline = null: expected a mapping"),
    "a value that is null": (b"pipeline: {size: null}", "pipeline.size = null: expected int"),
    "an unknown key": (b"pipeline: {sizes: 3}", "did you mean 'pipeline.size'"),
    "an unknown key, deep": (b"pretrain: {train: {learning-rate: 3}}", "did you mean 'pretrain.train.lr'"),
    "a number as a key": (b"3: 4", "unknown setting '3'"),
    "a list as a key": (b"? [a]\n: 4", "expected a name"),
    "octal": (b"seed: 010", "seed = '010'"),
    "sexagesimal": (b"seed: 1:30", "seed = '1:30'"),
    "a float for an int": (b"updates: 1.0", "did you mean 1?"),
    "a bool for an int": (b"updates: true", "updates = True"),
    "a number for a text": (b"name: 3", "name = 3"),
    "an object": (b"!!python/object/apply:os.system ['true']", "no YAML"),
    "a weight that is no number": (b"reward: {ink: lots}", "reward = {'ink': 'lots'}"),
    "another agent's setting": (b"agent: {name: draft, clip: 0.2}", "it belongs to ddpo"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration_is_named(name, typed, tmp_path):
    content, part = FILES[name]
    (tmp_path / "c.yaml").write_bytes(content)
    require_refused(typed("finetune", "--config", str(tmp_path / "c.yaml")), part)


def test_a_configuration_of_common_forms_is_read(typed, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 0x10\nagent.lr: 1e-4\nmonitor: {held_out: ink}\nchain: &c {steps: 7}\n")
    read = typed("finetune", "--config", str(file)).settings
    assert (read.seed, read.agent.lr, read.monitor.held_out, read.chain.steps) == (16, 1e-4, ("ink",), 7)


LINES = [
    ("finetune --reward-options {}", "did you mean 'reward_options'?"),
    ("finetune --lr 1e-4", "did you mean 'agent.lr'"),
    ("pretrain --learning_rate 1", "did you mean 'train.lr'?"),
    ("distill --lr 1", "did you mean 'method.lr'"),
    ("finetune --agent.learning-rate 1", "did you mean 'agent.lr'?"),
    ("finetune --batch_size 4", "'agent.micro_batch'"),
    ("finetune --epochs 4", "did you mean 'updates'"),
    ("finetune --num_steps 4", "did you mean 'updates'"),
    ("finetune --rank 8", "--lora 'LoRA(rank=...)'"),
    ("finetune --cfg 7", "chain.guidance_scale"),
    ("finetune --chain.eta 0.5", "--chain.kernel 'DDIM(eta=...)'"),
    ("finetune --agent draft --agent.clip .2", "it belongs to ddpo and ppo, not to agent 'draft'"),
    ("finetune --clip .2 --agent=draft", "it belongs to ddpo"),
    ("distill --method lcm --method.solver ddim", "it belongs to cd, not to method 'lcm'"),
    ("finetune --teacher x", "it belongs to opd, not to agent 'ddpo'"),
    ("pretrain --teacher x", "it belongs to distill"),
    ("sample runs/x --agent ddpo", "--checkpoint runs/x"),
    ("pretrain --agent ddpo", "it belongs to finetune"),
    ("finetune runs/x", "expected --resume runs/x to go on with a run, or --base runs/x"),
    ("finetune owner/name", "--base owner/name"),
    ("finetune ddpo", "expected --agent ddpo"),
    ("finetune inkk", "expected --reward ink"),
    ("distill lcm", "expected --method lcm"),
    ("pretrain eps", "expected --objective eps"),
    ("evaluate runs/x", "expected --checkpoint runs/x"),
    ("finetune seed=3", "such as --seed 3"),
    ("finetune SEED=3", "such as --seed 3"),
    ("finetune \u2013\u2013seed 3", "expected --seed"),
    ("finetune \u2014seed 3", "expected --seed"),
    ("finetune -seed 3", "did you mean --seed?"),
    ("finetune --Seed 3", "did you mean 'seed'?"),
    ("finetune --upd 3", "did you mean 'updates'?"),
    ("finetune --seed", "--seed has no value"),
    ("finetune --seed --updates 3", "--seed has no value"),
    ("finetune --monitor.stop", "--monitor.stop true"),
    ("finetune --no-stop", "--monitor.stop false"),
    ("finetune --monitor.stop 1", "did you mean true?"),
    ("finetune --seed= ", "seed = ''"),
    ("finetune --seed=1.0", "did you mean 1?"),
    ("finetune --updates 1e3", "did you mean 1000?"),
    ("finetune --agent.dual_clip None", "did you mean null?"),
    ("finetune --agent.form iss", "did you mean 'is'?"),
    ("finetune --lora 8", "expected LoRA(rank=8)"),
    ("finetune --lora LoRA(rnk=8)", "did you mean 'rank'?"),
    ("finetune --lora LoRA(rank='8')", "expected int"),
    ("finetune --chain 3", "expected a mapping"),
    ("finetune --chain.steps 0", "chain.steps = 0"),
    ("finetune --chain.steps 99999999", "at most 100000"),
    ("finetune --chain.repeats -1", "chain.repeats = -1"),
    ("finetune --seed 3 x", "--seed takes one value, and has '3'"),
    ("finetune --name \udcff", "expected UTF-8"),
    ("finetune --root= ", "root = ''"),
    ("finetune --threads 99999999999", "at most 1024"),
    ("finetune --budget_queries 10", "expected at least 240"),
    ("finetune --config nowhere.yaml", "there is no such file"),
    ("finetune --config .", "this is no file"),
    ("compare --agents ddpo(lr=big)", "did you mean lr='big'?"),
    ("compare --agents ddpo(lr='big')", "expected float"),
    ("compare --agent ddpo", "did you mean 'agents'?"),
    ("serve-reward ink --port 99999", "port = 99999"),
    ("sample --checkpoint x --out x.txt", "expected a file that ends in .png"),
    ("sample --checkpoint x --out .", "out = '.'"),
    ("evaluate --checkpoint x --out x.txt", "ends in .json"),
    ("evaluate --checkpoint x --out /dev/null/x.json", "nothing can be written"),
    ("sample", "needs --checkpoint"),
    ("check-model", "needs --model"),
    ("serve-reward", "needs --reward"),
    ("fintune", "did you mean 'finetune'?"),
    ("FINETUNE", "did you mean 'finetune'?"),
    ("check_reward", "did you mean 'check-reward'?"),
    ("--seed 3", "is no command"),
    ("finetune --resolution 512", "did you mean 'pipeline.size'?"),
    ("pretrain --resolution 32", "did you mean 'size'?"),
    ("finetune --max_train_steps 9", "did you mean 'updates'?"),
    ("train-clip --max_train_steps 9", "did you mean 'steps'?"),
    ("finetune --gradient_accumulation_steps 4", "did you mean 'agent.micro_batch'?"),
    ("pretrain --gradient_accumulation_steps 4", "'gradient_accumulation_steps': rlfusion pretrain --help lists"),
    ("finetune --train_batch_size 4", "did you mean 'agent.micro_batch'?"),
    ("check-model x --num_inference_steps 9", "did you mean 'chain.steps'?"),
    ("sample --checkpoint x --guidance 5", "did you mean 'chain.guidance_scale' or 'chain.guidance'?"),
    ("finetune --mixed_precision fp16", "did you mean 'precision'?"),
    ("sample --checkpoint x --mixed_precision fp16", "did you mean 'pipeline.dtype'?"),
    ("finetune --output_dir x", "did you mean 'root' or 'name'?"),
    ("evaluate --checkpoint x --output_dir x", "did you mean 'out'?"),
    ("finetune --report_to wandb", "did you mean 'track'?"),
    ("compare --learning_rate 1", "did you mean --agents 'ddpo(lr=...)'?"),
    ("sample --checkpoint x --learning_rate 1", "--help lists"),
    ("finetune --sample.num_steps 9", "did you mean 'chain.steps'?"),
    ("finetune --train.adam_beta1 .9", "--agent.optimizer 'adamw(betas=...)'"),
    ("finetune --agent grpo --train.clip_range .1", "did you mean 'agent.clip_low' or 'agent.clip_high'?"),
    ("finetune --per_prompt_stat_tracking.buffer_size 9", "did you mean 'agent.advantage_window'?"),
    ("finetune --lora_alpha 9", "did you mean --lora 'LoRA(alpha=...)'?"),
    ("finetune --resume_from_checkpoint x", "expected --resume FOLDER"),
    ("finetune --agent awr", "did you mean 'dawr'?"),
    ("finetune --agent rloo", "did you mean 'grpo' with baseline = leave_one_out and std = none?"),
    ("finetune --agent MixGRPO", "did you mean 'grpo' with outside = ode and a window, such as window = 2?"),
    ("compare --agents ddpo,dr-grpo", "did you mean 'grpo' with std = none?"),
    ("finetune --agent ddpo_trainer", "did you mean 'ddpo'?"),
    ("pretrain --objective flow_matching", "did you mean 'flow'?"),
    ("pretrain --objective epsilon", "did you mean 'eps'?"),
    ("finetune --lora LoRA(r=8)", "did you mean 'rank'?"),
    ("finetune --pipeline.dtype fp16", "did you mean 'float16'?"),
    ("finetune --seed 1 2", "--seed takes one value, and has '1'; expected --option VALUE\n"),
    ("finetune --seed= 3", "expected --seed 3"),
    ("compare --agents ddpo grpo", "expected a list, --agents ddpo,grpo"),
    ("finetune --name a b c", "quotes around a value with spaces, --name 'a b c'"),
    ("finetune --agent=", "unknown agent ''"),
    ("finetune --updates 1k", "did you mean 1000?"),
    ("finetune --updates 1,000", "did you mean 1000?"),
    ("finetune --updates 1_000_", "updates = '1_000_'"),
    ("finetune --updates \uff13", "did you mean 3?"),
    ("finetune --agent.lr 1/1000", "did you mean 0.001?"),
    ("finetune --agent.lr 1e\u22124", "did you mean 0.0001?"),
    ("finetune --agent.lr 10%", "did you mean 0.1?"),
    ("finetune --agent.lr 1e-4f", "agent.lr = '1e-4f': expected float, a finite number\n"),
    ("finetune --chain.guidance_scale 7,5", "did you mean 7.5?"),
    ("finetune --reward_timeout_s 5min", "did you mean 300?"),
    ("serve-reward ink --max_mb 64MB", "did you mean 64?"),
    ("finetune --updates 5MB", "updates = '5MB': expected int, a whole number\n"),
    ("finetune \u201c--seed\u201d 3", "expected --seed"),
    ("finetune --config seed", "or settings in braces"),
]


@pytest.mark.parametrize(("line", "part"), LINES, ids=[ascii(line) for line, _ in LINES])
def test_a_slip_of_the_hand_is_answered_with_what_was_meant(line, part, typed):
    require_refused(typed(*line.split(" ")[: None if line[-1] != " " else -1]), part)


def test_a_suggestion_is_never_what_was_typed(typed):
    for name, known in command_trees().items():
        names = [*known.leaves, *known.groups]
        draw = random.Random(name)
        for key in draw.sample(names, min(12, len(names))):
            wrong = key.replace("_", "-") + draw.choice(["x", "s", "_", "-"])
            said = typed(name, *NEEDED.get(name, ()), f"--{wrong}", "1")
            require_refused(said, repr(wrong))
            assert f"mean {wrong!r}" not in said.err
            assert "mean" in said.err or "belongs" in said.err or "--help" in said.err or "part of" in said.err


def test_words_in_one_are_told_apart(typed):
    require_refused(typed("finetune", "--agent grpo"), "expected --agent grpo, without quotes")
    require_refused(typed("finetune", "--seed = 3"), "expected --seed 3, without quotes")


@pytest.mark.parametrize("text", ["0.2", "3", "true", "yes", "null", "1e3", "-.inf", "0x1", "nan", "", " "])
def test_a_text_that_would_be_read_otherwise_stands_in_quotes(text, typed, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"agent": {"clip": text}}))
    require_refused(typed("finetune", "--config", str(tmp_path / "c.yaml")), f"agent.clip = {text!r}: expected float")


def test_what_other_programs_call_a_setting_is_one_of_the_command():
    trees = [tree(config.with_agent(a)) for a in AGENTS] + [tree(config.with_method(m)) for m in distill.METHODS]
    trees += list(command_trees().values())
    ours = {name for known in trees for name in known.leaves}
    meant = {name for row, _ in foreign.ROWS for one in row.split() for name in one.partition("=")[0].split("|")}
    assert meant <= ours
    words = [word for _, row in foreign.ROWS for word in row.split()]
    assert len(words) == len(set(words)) > 200
    for known in trees:
        for word in words:
            said = foreign.hint(word, list(known.leaves))
            named = re.findall(r"'([\w.]+)'", said) if "--" not in said else re.findall(r"--([\w.]+)", said)
            assert said == "" or (named and set(named) <= set(known.leaves)), (word, said)


RIGHT = [
    ("finetune --monitor.held_out jpeg_compressibility", "monitor.held_out", ("jpeg_compressibility",)),
    ("finetune --monitor.held_out ink,symmetry", "monitor.held_out", ("ink", "symmetry")),
    ("compare --agents ddpo(form='sf',lr=1),grpo", "agents", ["ddpo(form='sf',lr=1)", "grpo"]),
    ("compare --best_of 4,8", "best_of", [4, 8]),
    ("compare --guidance 1.5", "guidance", [1.5]),
    ("train-clip --templates a,b", "templates", ["a,b"]),
    ("finetune --agent DDPO", "agent.name", "ddpo"),
    ("finetune --seed -3", "seed", -3),
    ("finetune --name 3", "name", "3"),
    ("finetune --agent.dual_clip null", "agent.dual_clip", None),
    ("finetune --monitor.stop yes", "monitor.stop", True),
    ("finetune --model owner/x --config {base:_''}", "base", ""),
    ("finetune --reward {ink:_1,symmetry:_-.5}", "reward", {"ink": 1, "symmetry": -0.5}),
    ("finetune --reward_options.class_logprob.weights x", "reward_options", {"class_logprob": {"weights": "x"}}),
    ("check-reward ink --options.a 3 --options.b y", "options", {"a": 3, "b": "y"}),
]


@pytest.mark.parametrize(("line", "key", "value"), RIGHT, ids=[line for line, *_ in RIGHT])
def test_what_is_clear_is_taken_as_it_is_meant(line, key, value, typed):
    said = typed(*[word.replace("_", " ") if word[0] == "{" else word for word in line.split()])
    assert (said.code, said.err) == (0, "")
    held: Any = said.settings
    for name in key.split("."):
        held = getattr(held, name)
    assert held == value


def test_a_setting_given_twice_holds_last_and_says_so(typed):
    said = typed("finetune", "--seed", "3", "--seed", "4")
    assert said.settings.seed == 4
    assert said.err == "rlfusion: note: --seed is given twice, as '3' and as '4': the last holds\n"
    assert typed("finetune", "--seed", "3", "--seed", "3").err == ""


@pytest.mark.parametrize("line", ["help finetune x", "--version x", "--help finetune", "-h x y", "help a b"])
def test_a_word_too_many_beside_help_is_named(line, typed):
    said = typed(*line.split())
    assert (said.code, said.out) == (2, "")
    assert (
        said.err
        == f"rlfusion: rlfusion {line}: expected nothing behind {line.split()[0]}, or rlfusion COMMAND --help\n"
    )


@pytest.mark.parametrize("line", ["", "help", "help finetune", "finetune -h", "finetune --seed 1 --help"])
def test_help_is_help(line, typed):
    said = typed(*line.split())
    assert (said.code, said.err) == (0, "")
    assert "rlfusion finetune" in said.out
