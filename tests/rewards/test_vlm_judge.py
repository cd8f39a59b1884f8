"""A vision-language model as the judge: what it is asked, how answers are read, what it costs, no secret kept."""

import json
from dataclasses import asdict
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest
import torch
from chat_endpoint import endpoint

from rlfusion.common.errors import ConfigError
from rlfusion.config import Finetune, Rollout
from rlfusion.config.parts import Learners
from rlfusion.rewards import RewardFailure, build, score
from rlfusion.rewards.account import Account
from rlfusion.rewards.base import RewardUnavailable
from rlfusion.rewards.registry import task_info

PROMPTS = ("a red cat", "two dogs")
INFO = task_info(PROMPTS, (3, 8, 8))
COND = torch.tensor([0, 1, 0])


def flat(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def judge(url: str, prompts=PROMPTS, **options):
    quick = {"patience_s": 0.6, "timeout_s": 5.0} | options.pop("limits", {})
    told = {"url": url, "model": "vlm", "limits": quick, **options}
    return build("vlm_judge", {"vlm_judge": told}, task_info(prompts, (3, 8, 8)))


def brightness(question, image) -> str:
    return f"{10 * np.asarray(image).mean() / 255:.2f}"


def test_each_sample_is_asked_about_with_its_prompt_and_scored_within_the_scale(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen")
    with endpoint(brightness) as server:
        made = judge(server.url)
        values = score(made, flat(0.2, 0.6, 1.0), COND, "vlm_judge")
    torch.testing.assert_close(values, torch.tensor([0.2, 0.6, 1.0]), atol=1e-3, rtol=0)
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer sk-not-to-be-seen"}
    assert {headers["Content-Type"] for _, headers, _ in server.asked} == {"application/json"}
    bodies = [body for _, _, body in server.asked]
    texts = [body["messages"][0]["content"][0]["text"] for body in bodies]
    assert sorted(PROMPTS[0] in text for text in texts) == [False, True, True]
    assert all("from 0 to 10" in text for text in texts)
    assert all((body["model"], body["temperature"]) == ("vlm", 0) for body in bodies)
    assert (made.spent.questions, made.spent.read, made.spent.written) == (3, 270, 6)


def test_another_scale_and_question_are_those_of_the_settings():
    with endpoint(lambda question, image: "3" if question == "a red cat? -1..3" else "-1") as server:
        made = judge(server.url, prompt="{prompt}? {low:g}..{high:g}", scale=[-1, 3])
        assert made(flat(0.1, 0.2, 0.3), COND).tolist() == [1.0, 0.0, 1.0]
        assert judge(server.url, prompts=(), prompt="good?", scale=[-1, 3])(flat(0.5), torch.tensor([0])).tolist() == [
            0.0
        ]


def test_a_question_is_asked_once():
    with endpoint(brightness) as server:
        made = judge(server.url)
        first = made(flat(0.2, 0.6, 0.2), COND)
        assert len(server.asked) == 2, "twice the same image and prompt in one batch"
        assert torch.equal(made(flat(0.2, 0.6, 0.2), COND), first)
        assert len(server.asked) == 2
        assert made.spent.remembered == 2
        made(flat(0.2, 0.6, 0.2), torch.tensor([1, 1, 1]))
        assert len(server.asked) == 3, "another prompt is another question"


def test_questions_are_under_way_together():
    barrier, missed = Barrier(3), []

    def together(question, image):
        try:
            barrier.wait(5)
        except BrokenBarrierError:
            missed.append(question)
        return "5"

    with endpoint(together) as server:
        judge(server.url, limits={"at_once": 3})(flat(0.1, 0.2, 0.3), COND)
    assert not missed


READ = {
    "7": 0.7,
    " 7.5\n": 0.75,
    "**7**": 0.7,
    "Score: 7": 0.7,
    "rating = 7": 0.7,
    "7/10": 0.7,
    "7.": 0.7,
    "+7": 0.7,
    "0": 0.0,
}
UNREAD = ("", "seven", "7 of 10", "7/5", "7 8", "I would say 7", "11", "-1", "nan", "inf", "1e1", "7,5", None, 7, ["7"])


@pytest.mark.parametrize("text", READ)
def test_one_number_is_read(text):
    with endpoint(lambda question, image: text) as server:
        assert judge(server.url)(flat(0.5), torch.tensor([0])).item() == pytest.approx(READ[text])


@pytest.mark.parametrize("text", UNREAD)
def test_anything_else_is_a_failure_of_that_sample_and_never_a_zero(text):
    said = "failed for 1 of 3 samples: item 1: it answered"
    with (
        endpoint(lambda question, image: text if "dogs" in question else "4") as server,
        pytest.raises(RewardFailure, match=said) as failed,
    ):
        judge(server.url)(flat(0.1, 0.2, 0.3), COND)
    assert failed.value.values.isnan().tolist() == [False, True, False]
    assert failed.value.exit_code == 4
    assert len(server.asked) == 4, "asked once more"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"choices": []}', b'{"choices": [{"message": 3}]}', b"\xff\xfe"])
def test_an_answer_that_is_no_chat_completion_is_a_failure(body):
    with endpoint(lambda question, image: (200, body)) as server, pytest.raises(RewardFailure, match="chat completion"):
        judge(server.url)(flat(0.5), torch.tensor([0]))


def test_an_endpoint_that_fails_is_asked_again_until_patience_is_over():
    answers = iter([(503, b"busy"), (429, b"slow down"), "6"])
    with endpoint(lambda question, image: next(answers)) as server:
        assert judge(server.url, limits={"patience_s": 5.0})(flat(0.5), torch.tensor([0])).item() == pytest.approx(0.6)
    with (
        endpoint(lambda question, image: (500, b"broken")) as server,
        pytest.raises(RewardUnavailable, match=r"did not answer within patience_s = 0.6: HTTP 500 broken") as failed,
    ):
        judge(server.url)(flat(0.5), torch.tensor([0]))
    assert failed.value.exit_code == 69


def test_a_refusal_ends_at_once_and_shows_no_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-not-to-be-seen")
    with (
        endpoint(lambda question, image: (401, b"wrong key")) as server,
        pytest.raises(ConfigError, match="refuses: HTTP 401 wrong key") as refused,
    ):
        judge(server.url, key_variable="MY_KEY")(flat(0.5), torch.tensor([0]))
    assert len(server.asked) == 1
    assert "sk-not" not in str(refused.value)


def test_tokens_have_a_limit_and_are_told(monkeypatch, caplog):
    monkeypatch.setattr("rlfusion.rewards.vlm_judge.TOLD_FIRST", 200)
    with endpoint(brightness) as server:
        made = judge(server.url, limits={"most_tokens": 184, "at_once": 1})
        made.spent._told = 150
        with pytest.raises(ConfigError, match=r"spent 2 questions, 180 tokens read and 4 written: expected less than"):
            made(flat(0.1, 0.2, 0.3), COND)
    assert len(server.asked) == 2
    assert "vlm_judge: 2 questions, 180 tokens read and 4 written" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "localhost"}, "expected http://host:port/v1"),
        ({"url": "http://me:secret@host/v1"}, "without a key in it"),
        ({"url": "https://host/v1?key=secret"}, "without a key in it"),
        ({"scale": [1]}, "expected .low, high."),
        ({"scale": [3, 3]}, "low < high"),
        ({"scale": [0, float("inf")]}, "scale = .0, inf. of reward"),
        ({"prompt": "{image}"}, "expected a text with .prompt. in it"),
        ({"prompt": "{"}, "expected a text with"),
        ({"api_key": "secret"}, "unknown option of reward 'vlm_judge' 'api_key'"),
        ({"limits": {"at_once": 0}}, "at_once = 0"),
        ({"limits": {"at_onc": 1}}, "did you mean 'at_once'"),
    ],
)
def test_settings_that_cannot_work_and_secrets_among_them_are_refused(options, said):
    told = {"url": "http://127.0.0.1:9/v1", "model": "vlm", **options}
    with pytest.raises(ConfigError, match=said) as refused:
        build("vlm_judge", {"vlm_judge": told}, INFO)
    assert "secret" not in str(refused.value)


def test_no_setting_holds_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen")
    told = {"vlm_judge": {"url": "http://127.0.0.1:9/v1", "model": "vlm"}}
    assert "sk-not" not in json.dumps(asdict(Finetune(reward="vlm_judge", reward_options=told)), default=str)


def test_an_account_is_of_all_that_name_it_and_outlives_them(tmp_path):
    """The endpoint counts 92 tokens an answer."""
    limits = {"most_tokens": 184, "at_once": 1, "account": str(tmp_path / "tokens"), "retries": 0}
    with endpoint(brightness) as server:
        first, second = (judge(server.url, limits=limits) for _ in range(2))
        first(flat(0.1), COND[:1])
        second(flat(0.2), COND[:1])
        assert first.account.total() == second.account.total() == first.spent.tokens + second.spent.tokens
        for one in (first, second, judge(server.url, limits=limits)):
            with pytest.raises(ConfigError, match=r"tokens in .*expected less than most_tokens = 184"):
                one(flat(0.7), COND[:1])
        assert len(server.asked) == 2
    (tmp_path / "tokens").write_text("many\n")
    with pytest.raises(ConfigError, match=r"is damaged \(it holds b'many'\)"):
        judge(server.url, limits=limits)(flat(0.1), COND[:1])
    (tmp_path / "tokens").write_text("")
    with pytest.raises(ConfigError, match="it has become shorter"):
        first(flat(0.7), COND[:1])


def test_lines_of_several_processes_do_not_mix(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    file = str(tmp_path / "tokens")
    with ProcessPoolExecutor(2, get_context("fork")) as several:
        list(several.map(added, [(file, n) for n in range(1, 5)]))
    assert Account(file).total() == 200 * (1 + 2 + 3 + 4)


def added(told):
    held = Account(told[0])
    for _ in range(200):
        held.add(told[1])


def test_accounts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected an absolute path"):
        Account("tokens")
    with pytest.raises(ConfigError, match="cannot be written"):
        Account(str(tmp_path))


@pytest.mark.parametrize("several", [{"rollout": Rollout(workers=2)}, {"learner": Learners(ranks=2, shares=2)}])
def test_a_limit_of_each_of_several_processes_is_refused(several):
    told = {"url": "http://x/v1", "model": "m", "limits": {"most_tokens": 9}}
    with pytest.raises(ConfigError, match="each worker and each rank would spend that"):
        Finetune(reward="vlm_judge", reward_options={"vlm_judge": told}, **several)
    told["limits"]["account"] = "/x"
    Finetune(reward="vlm_judge", reward_options={"vlm_judge": told}, **several)
