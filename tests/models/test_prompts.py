"""Files of prompts: what is read, how it is recognised, and that all else is refused in one line."""

import codecs
import gc
import json
import logging
import random
import re
import time

import pytest

from rlfusion.common import notices
from rlfusion.common.errors import ConfigError
from rlfusion.models.pipelines import Prompts, Settings
from rlfusion.models.pipelines.prompts import BLOCK, read

GENEVAL = [
    {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benches"},
    {"tag": "colors", "include": [], "exclude": [{"class": "cat", "count": 1}], "prompt": "a red cat"},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notices, "_said", set())
    return tmp_path


def written(name: str, content: str | bytes) -> str:
    with open(name, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return name


@pytest.mark.parametrize(
    ("name", "content", "texts", "metadata"),
    [
        ("parti.tsv", 'Prompt\tCategory\tChallenge\tNote\na bench\tA\tBasic\t\n"G I" in paint\tB\tWriting\tx\n',
         ["a bench", '"G I" in paint'],
         [{"Category": "A", "Challenge": "Basic", "Note": ""}, {"Category": "B", "Challenge": "Writing", "Note": "x"}]),
        ("quoted.tsv", 'prompt\tn\n"a\tb ""c"""\t1\n', ['a\tb "c"'], [{"n": "1"}]),
        ("drawbench.csv", 'Prompts,Category\r\n"A red, big car.",Colors\r\n"A ""sign""",Text\r\n',
         ["A red, big car.", 'A "sign"'], [{"Category": "Colors"}, {"Category": "Text"}]),
        ("geneval.jsonl", "\n".join(map(json.dumps, GENEVAL)), [r["prompt"] for r in GENEVAL],
         [{k: v for k, v in r.items() if k != "prompt"} for r in GENEVAL]),
        ("ocr.jsonl", '{"prompt": "a sign", "text": "HI"}\n', ["a sign"], [{"text": "HI"}]),
        ("hps.json", '["a", "b"]', ["a", "b"], []),
        ("coco.json", json.dumps({"images": [{"id": 7}], "annotations": [{"image_id": 7, "id": 1, "caption": "a"}]}),
         ["a"], [{"image_id": 7, "id": 1}]),
        ("list.json", '{"prompts": ["a", "b"], "version": 2}', ["a", "b"], []),
        ("pick.csv", "caption,has_label,n\na cat,True,4\n", ["a cat"], [{"has_label": "True", "n": "4"}]),
        ("spaced.csv", 'prompt, kind ,n\n "a, cat", red , 1\n a dog\t,blue,2\n', ["a, cat", "a dog"],
         [{"kind": "red", "n": "1"}, {"kind": "blue", "n": "2"}]),
        ("spaced.tsv", 'prompt\tkind\n a "b" c \t red\n', ['a "b" c'], [{"kind": "red"}]),
        ("spaced.jsonl", '{"prompt": " a ", "kind": " red"}', ["a"], [{"kind": " red"}]),
        ("strings.ndjson", '"a"\n\n"b"\n', ["a", "b"], []),
        ("UPPER.TXT", "a\r\n\r\n b \rc\u2028d", ["a", "b", "c\u2028d"], []),
        ("multi.csv", 'prompt\n"two\nlines"\n\nnext\n', ["two\nlines", "next"], []),
        ("repeats.txt", "a\na\nb\n", ["a", "a", "b"], []),
    ],
)  # fmt: skip
def test_the_fields_own_files(name, content, texts, metadata):
    found = read(written(name, content), "no")
    assert list(found.texts) == texts
    assert list(found.metadata) == metadata
    assert found.negatives == ("no",) * len(texts)


def test_negative_prompts_of_tables():
    found = read(written("p.csv", "prompt,negative_prompt,k\na,dark,1\nb,,2\n"), "no")
    assert found == Prompts(("a", "b"), ("dark", ""), ({"k": "1"}, {"k": "2"}))
    found = read(written("p.jsonl", '{"prompt": "a", "negative": "x"}\n{"prompt": "b"}'), "no")
    assert found.negatives == ("x", "no")
    found = read(written("q.jsonl", '{"prompt": "a"}\n{"prompt": "b", "negative_prompt": ""}'), "no")
    assert found == Prompts(("a", "b"), ("no", ""))


def test_a_column_can_be_said():
    name = written("p.csv", "en,de\na cat,eine Katze\n")
    assert read(name, column="de") == Prompts(("eine Katze",), ("",), ({"en": "a cat"},))
    with pytest.raises(ConfigError, match=r"no column of prompts in 'en', 'de': expected pipeline\.prompt_column"):
        read(name)
    with pytest.raises(ConfigError, match=r"(?s)prompt_column.*'dee'.*did you mean 'de'"):
        read(name, column="dee")
    with pytest.raises(ConfigError, match="'text', 'caption' could all be the prompt"):
        read(written("q.csv", "text,caption\na,b\n"))


def test_parquet_keeps_what_json_holds_and_names_what_is_left_out(caplog):
    arrow = pytest.importorskip("pyarrow")
    from datetime import datetime
    from decimal import Decimal

    from pyarrow import parquet

    columns = {
        "caption": ["a", "b"], "jpg_0": [b"x", b"y"], "created_at": [datetime(2023, 1, 2), None],
        "label_0": [0.5, float("nan")], "price": [Decimal("1.50")] * 2, "tags": [["x"], []], "box": [{"w": 1}, None],
    }  # fmt: skip
    parquet.write_table(arrow.table(columns), "p.parquet")
    found = read("p.parquet")
    assert found.texts == ("a", "b")
    first = {
        "created_at": "2023-01-02 00:00:00.000000",
        "label_0": 0.5,
        "price": "1.50",
        "tags": ["x"],
        "box": {"w": 1},
    }
    second = {"created_at": None, "label_0": None, "price": "1.50", "tags": [], "box": None}
    assert found.metadata == (first, second)
    assert "left out, as JSON cannot hold them: 'jpg_0'" in caplog.text
    with pytest.raises(ConfigError, match=r"no readable .parquet"):
        read(written("q.parquet", b"PAR1 nothing PAR1"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_marks_at_the_beginning_say_the_encoding(name, encoding):
    text = {"p.txt": "é cat\n", "p.csv": "prompt\né cat\n", "p.jsonl": '{"prompt": "é cat"}'}[name]
    assert read(written(name, text.encode(encoding))).texts == ("é cat",)


def test_other_encodings_are_said_or_refused_by_line_and_byte():
    name = written("p.txt", "a\nb\nun café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"line 3: byte 0xE9 at 10 is no utf-8 .*pipeline.encoding, such as latin-1"):
        read(name)
    assert read(name, encoding="latin-1").texts == ("a", "b", "un café")
    with pytest.raises(ConfigError, match=r"U\+0000.*utf-16-le"):
        read(written("q.txt", "a cat".encode("utf-16-le")))
    assert read("q.txt", encoding="utf-16-le").texts == ("a cat",)
    with pytest.raises(ConfigError, match=r"U\+0093"):  # a quotation mark of cp1252
        read(written("r.txt", "a “sign”".encode("cp1252")), encoding="latin-1")
    with pytest.raises(ConfigError, match=r"encoding = 'latin-1': .* begins with the mark of utf-8"):
        read(written("s.txt", codecs.BOM_UTF8 + b"a"), encoding="latin-1")
    for wrong in ("rot13", "klingon"):
        with pytest.raises(ConfigError, match=f"encoding = '{wrong}'"):
            read("s.txt", encoding=wrong)


@pytest.mark.parametrize(
    "text", ["x.tsv", "nosuch/prompts.csv", "p.json", "my prompts.csv", "./a b", "/no/where", "~/none", "hub/name",
             "data\\p", "C:\\p q", "Mr.Bean", "http://x.y/z", "p.yaml", "x" * 5000 + ".txt", "a/" + "x" * 5000],
)  # fmt: skip
def test_what_looks_like_a_path_and_is_none_is_an_error(text):
    with pytest.raises(ConfigError, match="there is no such file") as error:
        read(text)
    assert len(str(error.value)) < 600


def test_the_nearest_name_is_said_and_a_missing_folder():
    written("prompts.csv", "prompt\na\n")
    with pytest.raises(ConfigError, match=r"did you mean 'prompts.csv'"):
        read("Prompt.CSV")
    with pytest.raises(ConfigError, match="nor a folder 'nosuch'"):
        read("nosuch/prompts.csv")


def test_folders_devices_and_files_of_other_kinds_are_refused(here):
    (here / "data").mkdir()
    written("list.dat", "a")
    written("cat", "a")
    for text, said in [("data", "is a folder"), ("/dev/zero", "no regular file"), ("list.dat", "another kind"),
                       ("cat", "another kind"), (".", "is a folder")]:  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            read(text)


@pytest.mark.parametrize(
    "text", ["a red cat", "a cat/dog hybrid", "1.5", "a cat.", "x" * 5000, "50% off", "~ wave", "a, b"]
)
def test_prompts_are_prompts(text):
    assert read(f" {text} ", "no") == Prompts((text,), ("no",))


@pytest.mark.parametrize("text", ["", " ", "a\nb", "a\0b", "\udc80"])
def test_texts_that_are_no_prompt(text):
    with pytest.raises(ConfigError, match="prompt"):
        read(text)


def test_repeats_and_metadata_are_said_in_one_line(caplog):
    read(written("g.jsonl", "\n".join(json.dumps(GENEVAL[i % 2]) for i in range(8))))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        "prompts = 'g.jsonl': 8 rows of 2 distinct prompts, each row a prompt of its own; "
        "column 'prompt' is the prompt, metadata are 'exclude', 'include', 'tag'"
    )


def test_an_edited_file_is_noticed():
    settings = Settings(prompts=written("p.csv", "prompt,k\na,1\nb,2\n")).recorded()
    assert settings.prompts.endswith("/p.csv")
    assert settings.read("dark").negatives == ("dark", "dark")
    written("p.csv", "prompt,k\r\na,1\r\n\r\nb,2\r\n")  # the same rows
    settings.read("dark")
    written("p.csv", "prompt,k\na,1\nb,3\n")
    with pytest.raises(ConfigError, match="others than the run began with"):
        settings.read()


BROKEN_TABLES = {
    "csv": ["prompt\n", "prompt,x\na\n", "prompt,x\na,b,c\n", 'prompt\n"a\n', 'prompt\n"a"b\n', "prompt,prompt\na,b\n",
            "x,y\na,b\n", "prompt,x\n,1\n", "prompt\na\x00b\n", "a cat\na dog\n",
            "prompt,negative,negative_prompt\na,b,c\n"],
    "tsv": ["prompt\tx\na\n", "x\ty\na\tb\n", "prompt\tx\n\t1\n", "", "prompt\tprompt\na\tb\n"],
    "jsonl": ["{", '{"prompt": 3}', '{"prompt": null}', '{"prompt": ""}', '{"prompt": "a"}\n{"text": "b"}', "[]", "3",
              '"a"\n{"prompt": "b"}', '{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "x": NaN}',
              '{"prompt": "a", "x": 1e999}', '{"prompt": "\\ud800"}', '{"prompt": "\\u0000"}', "[" * 100_000,
              '{"prompt": "a", "negative": 4}', '{"prompt": "a"} {"prompt": "b"}', "", '{"prompt": ["a"]}', "{}"],
    "json": ["", "null", "3", '"a"', "[]", "[1]", '{"a": "b"}', '{"prompts": []}', '["a", {"prompt": "b"}]',
             '["a", ""]', '[{"text": "a", "caption": "b"}]',
             '{"prompt": "a"}\n{"prompt": "b"}', '{"prompts": ["a"], "captions": ["b"]}', "[["],
    "txt": ["", "\n \n", "a\x00b", "a\x1b[31m"],
    "parquet": ["", "PAR1", "not a table"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "content"), [(kind, content) for kind, held in BROKEN_TABLES.items() for content in held]
)
def test_broken_files_are_refused_in_one_line(kind, content):
    with pytest.raises(ConfigError, match=f"p.{kind}") as error:
        read(written(f"p.{kind}", content))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_give_prompts_or_one_line(seed):
    """Bytes flipped, cut out, doubled or put in, in a sound file of each kind."""
    draw = random.Random(seed)
    sound = {
        "txt": "a red cat\nzwei Hunde, drei Fußbälle\n\nun café\n",
        "csv": 'prompt,tag,negative\n"a, ""b""",x,\nc é,y,dark\n',
        "tsv": 'Prompt\tCategory\n"G I" é\tA\nb\tB\n',
        "jsonl": "\n".join(map(json.dumps, GENEVAL)),
        "json": json.dumps([*GENEVAL, {"prompt": "ß"}], ensure_ascii=False),
    }
    kind = draw.choice(sorted(sound))
    data = bytearray(sound[kind].encode(draw.choice(["utf-8", "utf-8-sig", "utf-16", "latin-1"])))
    for _ in range(draw.randint(1, 4)):
        at, some = draw.randrange(len(data)), draw.randbytes(draw.randint(0, 3))
        data[at : at + draw.randint(0, 3)] = some or data[at // 2 : at]
    begin, said = time.monotonic(), ""
    try:
        found = read(written(f"p.{kind}", bytes(data)))
        assert all(text == text.strip() and text for text in found.texts)
        assert "\0" not in "".join(found.texts)
        json.dumps(found.metadata, allow_nan=False)
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert time.monotonic() - begin < 10


def test_the_digest_is_of_every_text_negative_prompt_and_fact():
    count = 2 * BLOCK + 1
    rows = {"texts": ["a cat"] * count, "negatives": ["ugly"] * count, "metadata": [{"k": 1}] * count}

    def digest(**changed) -> str:
        return Prompts(**{name: tuple(held) for name, held in (rows | changed).items()}).sha256

    seen = [digest(), digest(metadata=[]), *(Prompts(("a cat",) * n, ("",) * n).sha256 for n in (1, BLOCK, BLOCK + 1))]
    for at in (0, BLOCK - 1, BLOCK, count - 1):
        for name, other in {"texts": "a dog", "negatives": "", "metadata": {"k": 2}}.items():
            seen.append(digest(**{name: [*rows[name][:at], other, *rows[name][at + 1 :]]}))
    assert len(set(seen)) == len(seen)
    assert digest() == seen[0]


@pytest.mark.alone
def test_a_large_file_takes_no_quadratic_time():
    """Ten times the rows take some ten times the time, with repeats among them, and not a hundred times; without what a
    collection of garbage takes, which goes through all that other tests have left.
    """

    def seconds(count: int) -> float:
        name = written(f"{count}.csv", "prompt,k\n" + "".join(f"a photo of thing {i // 2},{i}\n" for i in range(count)))
        gc.disable()
        try:
            begin = time.process_time()
            assert len(read(name).sha256) == 64
            return time.process_time() - begin
        finally:
            gc.enable()

    assert seconds(30_000) < 40 * max(seconds(3_000), 0.01)


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ('["a cat", "a dog"]', ".json"),
        ('{"prompts": ["a cat"]}', ".json"),
        ('{"prompt": "a cat"}\n{"prompt": "a dog"}\n', ".jsonl"),
        ("prompt\tcategory\na cat\tanimals\n", ".tsv"),
        ("id,caption\n1,a cat\n", ".csv"),
        ('"Prompt";"Tag"\na;b\n', ".csv"),
    ],
)
def test_a_table_is_no_text_of_prompts(text, suffix):
    with pytest.raises(ConfigError, match=re.escape(f"a {suffix} file")):
        read(written("p.txt", text))


@pytest.mark.parametrize("line", ["[a cat], in brackets", "{a cat}", "a prompt, a caption of it", "cat, dog", "a\tb"])
def test_a_line_that_looks_a_little_like_a_table_is_a_prompt(line):
    assert read(written("p.txt", f"{line}\na dog\n")).texts == (line, "a dog")


@pytest.mark.parametrize("title", ["negative prompt", "Negative Prompt", "negative-prompt", "NEGATIVE"])
def test_the_column_of_negative_prompts_in_any_spelling(title):
    assert read(written("p.csv", f"prompt,{title}\na cat,ugly\n")).negatives == ("ugly",)
