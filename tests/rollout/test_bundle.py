"""An item that failed on every worker is kept, and runs again elsewhere: from plain data, checked file by file."""

import json
import os

import pytest
from rollout_tasks import CLASSES, assert_identical, make_policy, make_recipe

from rlfusion.cli import main
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import Weights
from rlfusion.rewards import RewardError
from rlfusion.rollout import Keep, Local, Recipe, plan
from rlfusion.rollout.bundle import Bundle

ITEM = plan(7, 3, 3, 4, 5, CLASSES, 2)[1]
FAILED = {0: "raised RewardError: it", 4: "raised RewardError: it"}


def weights() -> Weights:
    return Weights.of(make_policy(), 2)


def kept(folder, fault: str = "nan", error: Exception | None = None, recipe: Recipe | None = None):
    """The folder of a bundle, of an item that fails with NaN."""
    recipe = recipe or make_recipe(fault)
    if error is None:
        with pytest.raises(RewardError) as caught:
            Local(make_recipe("nan").build()).collect([ITEM], weights())
        error = caught.value
    return Keep(folder / "failed-items", "mine", ("a", "b", "c")).write(recipe, ITEM, weights(), FAILED, error)


def test_what_is_written_is_read_and_no_file_is_a_pickle(tmp_path):
    blobs = {"reward": weights().blob, "space": weights().blob}
    folder = kept(tmp_path, recipe=Recipe("rollout_tasks:build", {"fault": "nan", "marker": ""}, blobs))
    assert folder == tmp_path / "failed-items" / "iteration-3-item-1"
    assert sorted(os.listdir(folder)) == [
        "bundle.json",
        "part-reward.safetensors",
        "part-space.safetensors",
        "weights.safetensors",
    ]
    bundle = Bundle.read(folder)
    assert (bundle.run, bundle.item, bundle.weights) == ("mine", ITEM, weights())
    assert bundle.prompts == tuple("abc"[group] for group in ITEM.groups)
    assert bundle.recipe.blobs == blobs
    assert bundle.workers == {"0": FAILED[0], "4": FAILED[4]}
    assert json.loads((folder / "bundle.json").read_text())["item"]["seed"] == 7


def test_it_fails_alike_and_that_is_said_with_what_is_known(tmp_path, capsys):
    assert main.main(["reproduce", str(kept(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert f"{ITEM} of run mine, seed 7" in said
    assert "worker 4 raised RewardError: it" in said
    assert "it fails alike: RewardError: reward 'brightness'" in said


def test_it_fails_otherwise(tmp_path, capsys):
    folder = kept(tmp_path, error=RewardError("something else"))
    assert main.main(["reproduce", str(folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "it fails otherwise: RewardError: reward 'brightness'" in said
    assert "on the workers it was RewardError: something else" in said


def test_it_does_not_fail_and_has_the_walks_of_the_weights_that_acted(tmp_path, capsys):
    folder = kept(tmp_path, "")
    assert main.main(["reproduce", str(folder)]) == 0
    assert "it does not fail here: 5 walks, mean reward" in capsys.readouterr().out
    (expected,) = Local(make_recipe().build()).collect([ITEM], weights())
    assert_identical(Bundle.read(folder).run_again("cpu"), expected)


def test_an_item_kept_again_takes_the_place_of_the_first(tmp_path):
    first = kept(tmp_path, recipe=Recipe("rollout_tasks:build", {"fault": "", "marker": ""}, {"old": weights().blob}))
    assert kept(tmp_path) == first
    assert sorted(os.listdir(first)) == ["bundle.json", "weights.safetensors"]


def _flip(folder):
    file = folder / "weights.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)


def _change(**changes):
    def damage(folder):
        file = folder / "bundle.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


DAMAGE = {
    "no folder": (
        lambda folder: (folder / "bundle.json").unlink(),
        r"is no bundle: expected a folder with bundle\.json",
    ),
    "no JSON": (lambda folder: (folder / "bundle.json").write_text("{"), "is no JSON"),
    "brackets": (lambda folder: (folder / "bundle.json").write_text("[" * 200_000), "is no JSON"),
    "a list": (lambda folder: (folder / "bundle.json").write_text("[]"), "format 'list', expected 1"),
    "another format": (_change(format=2), "format 2, expected 1"),
    "no weights": (lambda folder: (folder / "weights.safetensors").unlink(), r"weights\.safetensors cannot be read"),
    "a flipped byte": (_flip, r"weights\.safetensors: SHA-256 .*, expected"),
    "a pickle": (
        lambda f: (f / "weights.safetensors").write_bytes(b"\x80\x04."),
        r"weights\.safetensors cannot be read",
    ),
    "a way out": (_change(sha256={"../weights.safetensors": "0"}), "which is no file of the bundle"),
    "weights unnamed": (_change(sha256={}), "KeyError at 'weights.safetensors'"),
    "an item of another kind": (_change(item={"seed": 1}), "KeyError"),
    "no error": (_change(error=None), "TypeError"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bundle_that_is_not_whole_is_refused_in_one_line(tmp_path, capsys, damage):
    folder = kept(tmp_path)
    change, said = DAMAGE[damage]
    change(folder)
    with pytest.raises(ConfigError, match=said):
        Bundle.read(folder)
    assert main.main(["reproduce", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
