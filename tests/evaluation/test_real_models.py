"""Evaluation of real models: FID and KID against torch-fidelity and scikit-learn, the paired test against scipy, the
extractors against what they wrap; two models on the same seeds, from one sample on.
"""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
import torch
from backbones import NET, random_backbone
from PIL import Image
from sklearn.metrics.pairwise import polynomial_kernel

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.config import Evaluate
from rlfusion.data import Dataset
from rlfusion.evaluation import figures, frechet_distance, plain_figures, plain_report, report
from rlfusion.evaluation.extractors import extracted, make_extractor
from rlfusion.evaluation.kernel_distance import kernel_distance
from rlfusion.evaluation.paired import flips, standard_error
from rlfusion.jobs.against_real import Beside, beside_of


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- the distances ---


@pytest.mark.parametrize(("n", "m", "f"), [(2, 2, 1), (30, 20, 7), (5, 50, 3)])
def test_the_kernel_distance_is_scikit_learn_s_mean_over_pairs(n, m, f):
    a, b = normal(n, f), normal(m, f, seed=1) + 0.3
    own, other, cross = (polynomial_kernel(x, y, degree=3, gamma=1 / f, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    exact = (own.sum() - np.trace(own)) / (n * (n - 1)) + (other.sum() - np.trace(other)) / (m * (m - 1))
    assert kernel_distance(a, b) == pytest.approx(exact - 2 * cross.mean(), rel=1e-10)


def test_fid_and_kid_are_those_of_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = normal(60, 8), normal(60, 8, seed=1) * 1.2 + 0.2
    moments = (fid.fid_features_to_statistics(x) for x in (a, b))
    theirs = fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-8)
    told = {"kid_subsets": 1, "kid_subset_size": 60, "verbose": False}  # one subset: all
    theirs = kid.kid_features_to_metric(a, b, **told)["kernel_inception_distance_mean"]
    assert kernel_distance(a, b) == pytest.approx(theirs, rel=1e-8)


def test_the_kernel_distance_of_two_sets_of_one_law_is_0_on_average():
    found = torch.tensor([kernel_distance(normal(10, 3, seed=n), normal(12, 3, seed=n + 1000)) for n in range(300)])
    assert abs(found.mean()) < 4 * standard_error(found)
    assert (found < 0).any()


def test_features_that_are_none_are_refused():
    for a, b in ((normal(1, 3), normal(5, 3)), (normal(5, 3), normal(5, 4)), (normal(5), normal(5))):
        with pytest.raises(ConfigError, match="expected"):
            kernel_distance(a, b)
    with pytest.raises(NumericalError, match="not finite"):
        kernel_distance(normal(5, 3) / 0, normal(5, 3))


@pytest.mark.parametrize("n", [2, 7, 12])
def test_the_paired_test_is_scipy_s(n):
    d = normal(n, seed=n) + 0.5
    theirs = scipy.stats.permutation_test(
        (d.numpy(), np.zeros(n)), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples", n_resamples=np.inf
    )
    assert flips(d, 0, 0) == pytest.approx(theirs.pvalue)


def test_the_paired_test_of_many_is_by_draws_and_never_0():
    d = normal(200) + 0.12
    exact = 2 * scipy.stats.norm.sf(abs(d.sum() / d.square().sum().sqrt()))  # the sum of signed values is near normal
    assert flips(d, 20_000, 0) == pytest.approx(float(exact), abs=0.02)
    assert flips(torch.ones(200), 500, 0) == 1 / 501
    assert flips(torch.zeros(50), 500, 0) == 1
    assert flips(d, 500, 1) == flips(d, 500, 1)


# --- few samples ---

REAL = Dataset(images(40, 1, 8, 8) * 2 - 1, torch.arange(40) % 2, ("a", "b"))


@pytest.mark.parametrize(
    ("n", "lacks"),
    [
        (1, {"frechet", "precision", "recall", "diversity"}),
        (2, {"precision", "recall", "diversity"}),
        (3, {"precision", "recall"}),
        (4, set()),
    ],
)
def test_figures_that_so_few_samples_cannot_carry_are_left_out(n, lacks):
    judge = _judge()
    samples, label = images(n, 1, 8, 8, seed=3), torch.arange(n) % 2
    found = figures(samples, label, judge, REAL, REAL)
    assert {"frechet", "precision", "recall", "diversity"} - found.keys() == lacks
    assert found["brightness"] == pytest.approx(samples.mean().item())
    if not lacks:
        assert found == report(samples, label, judge, REAL, REAL).as_dict()
    else:
        with pytest.raises(ConfigError):
            report(samples, label, judge, REAL, REAL)


def _judge():
    class Judge(torch.nn.Module):
        head = torch.nn.Linear(64, 2)

        def features(self, x):
            return x.flatten(1)

    return Judge()


def test_figures_without_a_judge():
    samples, label = images(3, 3, 8, 8), torch.tensor([0, 1, 0])
    assert plain_figures(samples, label) == plain_report(samples, label)
    assert plain_report(samples, label).keys() - plain_figures(samples[:2], label[:2]).keys() == {"diversity"}
    with pytest.raises(ConfigError, match="two of a prompt"):
        plain_report(samples[:2], label[:2])


# --- the extractors ---


def test_inception_is_torch_fidelity_s_own_with_the_weights_of_the_file(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, held: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        theirs = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(theirs.state_dict(), file)
    samples = images(2, 1, 8, 8)
    text = f"Inception(weights={str(file)!r})"
    found = extracted(text, make_extractor(text), samples)
    (exact,) = theirs((samples.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))
    assert found.shape == (2, 2048)
    assert torch.equal(found, exact)


def test_a_clip_s_image_tower(tmp_path):
    pytest.importorskip("open_clip")
    from rlfusion.rewards.clip import towers
    from rlfusion.rewards.clip.small import SmallClip

    config, preprocess = SmallClip(width=32, layers=1, embed=16, image=12, patch=4).described((3, 12, 12))
    towers.save(tmp_path / "clip", towers.build(config, seed=0), config, preprocess)
    text = f"CLIP(model={str(tmp_path / 'clip')!r})"
    found = extracted(text, make_extractor(text), images(3, 3, 8, 8))
    assert found.norm(dim=1) == pytest.approx(torch.ones(3))
    opened = towers.load(str(tmp_path / "clip"))
    exact = opened.visual(opened.preprocess(images(3, 3, 8, 8)))
    assert torch.allclose(found, exact / exact.norm(dim=1, keepdim=True), atol=1e-6)


def settings(**given) -> Evaluate:
    return Evaluate(checkpoint="x", **given)


def test_lpips_within_a_prompt_is_the_mean_over_its_pairs(tmp_path):
    file, theirs = random_backbone(tmp_path)
    samples, label = images(5, 3, 64, 64), torch.tensor([0, 1, 0, 0, 1])
    text = f"LPIPS(net={NET!r}, weights={str(file)!r}, size=64)"
    values, _ = beside_of(settings(diversity=text), (3, 64, 64), print).figures(samples, label)
    x = samples * 2 - 1
    with torch.no_grad():
        of = [
            np.mean([theirs(x[i : i + 1], x[j : j + 1]).item() for i, j in itertools.combinations(members, 2)])
            for members in ((0, 2, 3), (1, 4))
        ]
    assert values["diversity_lpips"] == pytest.approx(np.mean(of), rel=1e-4)


REFUSED = {
    ("Inception", ""): "expected torch-fidelity's weights",
    ("Inceptio", ""): "did you mean 'Inception'?",
    ("thumbnails(side=3)", ""): "unknown setting of feature extractor",
    ("own.py:flat", ""): None,
    ("own.py:wrong", ""): r"gives \(10, 1, 8, 8\) of 10 samples: expected \(N, F\)",
    ("own.py:number", ""): "is not callable",
    ("thumbnails", "LPIPS(net='vg')"): "LPIPS backbone",
    ("thumbnails", "LPIPS(nett='vgg')"): "did you mean 'net'?",
}


@pytest.mark.parametrize(("features", "diversity"), REFUSED)
def test_extractors_that_cannot_be_are_refused(tmp_path, monkeypatch, features, diversity):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "own.py").write_text("flat = lambda x: x.flatten(1)\nnumber = 3\ndef wrong(x):\n    return x\n")
    np.savez(
        tmp_path / "real.npz", images=(images(10, 1, 8, 8).numpy() * 255).astype(np.uint8), labels=np.arange(10) % 2
    )
    given = settings(real="real.npz", features=features, diversity=diversity)
    if (said := REFUSED[features, diversity]) is None:
        values, left_out = beside_of(given, (1, 8, 8), print).figures(images(1, 1, 8, 8), torch.zeros(1))
        assert values == {"real_count": 10}
        assert left_out.keys() == {"fid", "kid", "real_precision", "real_recall"}
        return
    with pytest.raises(ConfigError, match=said):
        beside_of(given, (1, 8, 8), print)


def test_real_images_of_other_channels_are_refused(tmp_path):
    np.savez(tmp_path / "real.npz", images=np.arange(1920).reshape(10, 3, 8, 8).astype(np.uint8))
    said = r"its images are \(3, 8, 8\), the model's samples \(1, 8, 8\): expected grey images"
    with pytest.raises(ConfigError, match=said):
        beside_of(settings(real=str(tmp_path / "real.npz"), features="thumbnails"), (1, 8, 8), print)
    assert Beside().figures(images(1, 1, 8, 8), torch.zeros(1)) == ({}, {})


def test_a_folder_of_grey_pictures_is_held_against_a_model_of_one_channel(tmp_path):
    grey = (images(10, 1, 8, 8).numpy() * 255).astype(np.uint8)
    np.savez(tmp_path / "real.npz", images=grey)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image[0]).save(tmp_path / "real" / f"{i:02}.png")
    held, stored = (
        beside_of(settings(real=str(tmp_path / name), features="thumbnails"), (1, 8, 8), print).real
        for name in ("real", "real.npz")
    )
    assert torch.equal(held, stored)


# --- the command ---


def evaluated(*words) -> dict:
    assert main(["evaluate", *map(str, words), "--out", "it.json"]) == 0
    with open("it.json") as file:
        return json.load(file)


def test_from_one_sample_on(tiny_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = ("--checkpoint", tiny_root / "first", "--root", tiny_root, "--reward", "ink")
    one = evaluated(*told, "--evaluation.samples", 1)
    said = capsys.readouterr().out
    assert one["count"] == 1
    assert "frechet is left out: it takes 2 samples" in said
    assert "diversity is left out: it takes 2 samples of a class" in said
    assert not one.keys() & {"frechet", "precision", "recall", "diversity"}
    assert main(["evaluate", *map(str, told), "--evaluation.samples", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err


def test_two_models_on_the_same_seeds_under_both_samplers(tiny_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bases = (tiny_root / "cache").glob("base-*/model")  # other tests add theirs
    base = min(bases, key=lambda folder: folder.stat().st_mtime)
    np.savez(
        tmp_path / "real.npz", images=(images(12, 1, 8, 8).numpy() * 255).astype(np.uint8), labels=np.arange(12) % 2
    )
    common = ("--root", tiny_root, "--evaluation.samples", 20, "--rewards", "ink,symmetry", "--chain.steps", 4)
    first, second = str(tiny_root / "first"), str(base)
    both = evaluated(
        *("--checkpoint", first, "--against", second, "--samplers", "training,published", *common),
        *("--real", "real.npz", "--features", "thumbnails", "--diversity", "thumbnails"),
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "sample by sample (published)" in said
    for name in (first, second):
        alone = evaluated("--checkpoint", name, *common)
        assert {key: both["models"][name]["training"][key] for key in alone} == alone
        ode = evaluated("--checkpoint", name, *common, "--chain.kernel", "DDIM(eta=0.0)")
        assert {key: both["models"][name]["published"][key] for key in ode} == ode
        held = both["models"][name]["training"]
        assert {"fid", "kid", "real_precision", "real_recall", "diversity_thumbnails", "real_count"} <= held.keys()
    for sampler in ("training", "published"):
        for reward in ("reward_ink", "reward_symmetry"):
            means = [both["models"][name][sampler][reward] for name in (first, second)]
            paired = both["paired"][sampler][reward]
            assert paired["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)
            assert 0 < paired["p"] <= 1
            assert 0 <= paired["better"] <= 1


def test_a_model_is_no_better_than_itself(tiny_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ("--checkpoint", tiny_root / "first", "--against", tiny_root / "first", "--root", tiny_root)
    found = evaluated(*first, "--evaluation.samples", 14, "--reward", "ink")["paired"]["training"]["reward"]
    assert found == {"difference": 0, "better": 0.5, "standard_error": 0, "p": 1}


def test_held_out_prompts_of_a_pipeline_under_both_samplers(tiny_pipelines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.txt").write_text("a red cat\na green dog\na bird\n")
    model = ("--checkpoint", tiny_pipelines["sd"], "--evaluation.samples", 3, "--chain.steps", 2)
    one = evaluated(*model, "--prompts", "held_out.txt", "--reward", "jpeg_compressibility")
    assert one == evaluated(*model, "--pipeline.prompts", "held_out.txt", "--reward", "jpeg_compressibility")
    assert "diversity" not in one
    both = evaluated(
        *(*model[:4], "--chain.steps", 50, "--chain.kernel", "DDIM(eta=1.0)", "--samplers", "training,published"),
        *("--prompts", "held_out.txt", "--reward", "jpeg_compressibility"),
    )
    (held,) = both["models"].values()
    assert held["published"]["reward"] != held["training"]["reward"]
    published = evaluated(*model[:4], "--prompts", "held_out.txt", "--reward", "jpeg_compressibility")
    assert held["published"] == published


def test_what_the_command_refuses(tiny_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = ("--checkpoint", str(tiny_root / "first"), "--root", str(tiny_root), "--evaluation.samples", "2")
    known = {
        ("--samplers", "training,ode"): "samplers: 'ode': expected some of training, published",
        ("--samplers", "training,training"): "expected each once",
        ("--rewards", "ink,ink"): "expected each once",
        ("--rewards", "inc"): "did you mean 'ink'?",
        ("--prompts", "a cat"): "knows classes and reads no texts",
        ("--reward_options.symmetry.a", "1"): "reward_options of 'symmetry'",
        ("--against", "nowhere"): "'nowhere'",
        ("--evaluation.bits_per_dim", "true", "--against", "x"): "one model at a time",
    }
    for words, said in known.items():
        assert main(["evaluate", *first, *words]) == 2
        assert said in capsys.readouterr().err
