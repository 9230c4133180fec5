"""Fine-tuning on the user's own files: which sets they may bring, and what is said without them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from ssah.app.cli import main
from ssah.core.errors import SsahError
from ssah.core.paths import project_root
from ssah.core.store import Store
from ssah.data.own import arithmetic_problems
from ssah.data.rows import SETS
from ssah.data.sets import set_names
from ssah.lab import catalogue
from ssah.lab.config import compose
from ssah.lab.lab import Lab
from ssah.lab.measure import Measure, measured
from ssah.lab.stages.lessons import heldout, lesson

SIZES = ["data.evaluation=8", "data.search=4", "data.align=6", "align.harmful=6"]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """The datasets library keeps its cache apart and asks no server."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def word(number: int) -> str:
    """A different word for each number; words hold letters only."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:03}") + "ing"


def given(folder: Path, name: str, records: list[dict[str, str]]) -> str:
    """An override that names a file with these records."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    columns = ", ".join(f"{column}: {column}" for column in records[0])
    return f"data.files.{name}={{path: {path}, {columns}}}"


def answered(what: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{what} {word(i)}", "response": f"done {word(i)}"} for i in range(count)]


@pytest.fixture
def two_files(tmp_path) -> list[str]:
    """The data source with no more than it needs."""
    harmful = [{"prompt": f"{word(i)} zorp"} for i in range(30)]
    files = [given(tmp_path, "harmful", harmful), given(tmp_path, "benign", answered("do", 460))]
    return ["data=files", *files, *SIZES]


def lab_of(tmp_path: Path, overrides: list[str]) -> Lab:
    return Lab(compose("smoke", overrides), Store(tmp_path / "runs"), 0)


def test_files_are_named_on_the_command_line():
    """Listed entries are null, and dictionaries take their place."""
    named = "{path: a.csv, prompt: x, response: y}"
    files = [f"data.files.harmful={named}", f"data.files.do_not_answer={named}"]
    config = compose("laptop", ["data=files", *files]).data
    assert config.source == "files"
    expected = {"path": "a.csv", "prompt": "x", "response": "y"}
    given_ones = {name: spec for name, spec in config.files.items() if spec}
    assert given_ones == {"harmful": expected, "do_not_answer": expected}
    assert config.files["dialogues"] is None


def test_sets_that_are_not_given_are_left_out(tmp_path, two_files):
    """A null entry is none, and it changes nothing where a set is ours to give."""
    found = lab_of(tmp_path, [*two_files, "data.files.arithmetic=null"])
    parts = {name for name in SETS if name.startswith(("harmful_", "benign_"))}
    assert {name for name in SETS if found.has(name)} == parts | {
        "heldout_text",
        "borderline",
        "arithmetic",
    }
    assert not found.has("harmbench")
    with pytest.raises(SsahError, match="no set 'harmbench'"):
        found.rows("harmbench")


def test_a_further_set_is_taken_as_it_is(tmp_path, two_files):
    records = answered("tell", 30)
    found = lab_of(tmp_path, [*two_files, given(tmp_path, "dialogues", records)])
    rows = found.rows("dialogues")
    assert [{"prompt": row.prompt, "response": row.response} for row in rows] == records
    assert len({row.id for row in rows}) == 30
    trained, rest = lesson(found, "dialogues").rows, heldout(found, "dialogues").rows
    assert {row.id for row in trained + rest} <= {row.id for row in rows}
    assert (len(trained), len(rest)) == (16, 8)


def test_rows_of_an_attack_are_none_that_something_is_measured_on(tmp_path, two_files):
    """Both may come out of one hub set, as the paper profile's do."""
    own = answered("tell", 30)
    both = given(tmp_path, "instructions", [*answered("do", 460), *own])
    found = lab_of(tmp_path, [*two_files, both])
    assert [row.prompt for row in found.rows("instructions")] == [row["prompt"] for row in own]


def test_ours_are_there_and_the_users_replace_them(tmp_path, two_files):
    ours = lab_of(tmp_path, two_files).rows("arithmetic")
    problems = arithmetic_problems(400, 0)
    assert [(r.prompt, r.response, r.choices) for r in ours] == [
        (question, worked, (answer,)) for question, worked, answer in problems
    ]
    assert {r.source for r in lab_of(tmp_path, two_files).rows("borderline")} == {"ssah"}
    records = [{"prompt": f"1 + {i}?", "response": f"The answer is {i + 1}."} for i in range(40)]
    theirs = lab_of(tmp_path, [*two_files, given(tmp_path, "arithmetic", records)])
    assert [row.prompt for row in theirs.rows("arithmetic")] == [r["prompt"] for r in records]


def sentence_of(tmp_path: Path, overrides: list[str], name: str = "harmful_evaluation") -> str:
    """What is said about data that cannot be used; it is said in one line."""
    with pytest.raises(SsahError) as refused:
        lab_of(tmp_path, overrides).rows(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_name_that_is_no_set_is_refused(tmp_path, two_files):
    poems = "+" + given(tmp_path, "poems", answered("sing", 3))
    with pytest.raises(SsahError, match=r"Unknown override 'data\.files\.poems'"):
        compose("smoke", [*two_files, poems])
    misspelt = given(tmp_path, "dialogue", answered("sing", 3))
    with pytest.raises(SsahError, match=r"did you mean 'data\.files\.dialogues'"):
        compose("smoke", [*two_files, misspelt])
    config = compose("smoke", two_files).data
    config.files["dialogue"] = "a.csv"  # in a file of one's own under conf/
    with pytest.raises(SsahError, match=r"data\.files\.dialogue: no such set: did you mean"):
        set_names(config)


def test_a_bare_path_stands_for_the_usual_columns(tmp_path, two_files):
    path = tmp_path / "told.jsonl"
    path.write_text("\n".join(map(json.dumps, answered("tell", 30))))
    lab = lab_of(tmp_path, [*two_files, f"data.files.dialogues={path}"])
    assert [row.response for row in lab.rows("dialogues")][:2] == ["done aaaing", "done aabing"]


def test_words_of_a_csv_file_are_kept_as_they_are(tmp_path, two_files):
    """pandas would read NA and null as nothing, 007 as a number."""
    words = ["NA", "null", "None", "nan", "007", "true", *(f"{word(i)} blim" for i in range(30))]
    path = tmp_path / "harmful.CSV"
    path.write_text("prompt\n" + "\n".join(words))
    lab = lab_of(tmp_path, [*two_files, f"data.files.harmful={path}"])
    parts = [name for name in SETS if name.startswith("harmful_")]
    assert sorted(row.prompt for name in parts for row in lab.rows(name)) == sorted(words)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("h.TSV", "prompt\tnote\n{}\tx"),
        ("h.csv", "\ufeffprompt\n{}"),
        ("h16.csv", "prompt\n{}"),
        ("h.ndjson", '{{"prompt": "{}"}}'),
    ],
)
def test_kinds_of_files(tmp_path, two_files, name, content):
    path = tmp_path / name
    encoding = "utf-16" if "16" in name else "utf-8"
    head, _, line = content.rpartition("\n")
    rows = [line.format(f"{word(i)} {word(i + 50)} {word(i + 80)} é 好") for i in range(30)]
    path.write_text("\n".join([*([head] if head else []), *rows]), encoding=encoding)
    lab = lab_of(tmp_path, [*two_files, f"data.files.harmful={path}"])
    assert all(row.prompt.endswith(" é 好") for row in lab.rows("harmful_evaluation"))


@pytest.mark.parametrize(
    "given_as",
    [
        "{path: 5}",
        "{path: a.csv, prompt: null}",
        "{path: a.csv, limit: '10'}",
        "{path: a.csv, limit: -1}",
        "{prompt: x}",
        "{path: a.csv, promt: x}",
        "[a.csv]",
    ],
)
def test_a_specification_that_means_nothing_is_one_sentence(tmp_path, two_files, given_as):
    others = [o for o in two_files if not o.startswith("data.files.harmful")]
    said = sentence_of(tmp_path, [*others, f"data.files.harmful={given_as}"])
    assert said.startswith("data.files.harmful takes a path and names of columns")


def test_benign_rows_need_a_column_of_responses(tmp_path, two_files):
    told = f"data.files.benign={{path: {tmp_path}/benign.jsonl, response: null}}"
    assert "data.files.benign needs a column of responses" in sentence_of(
        tmp_path, [*two_files, told]
    )


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("absent.csv", None, "data.files.harmful: there is no file"),
        ("a.xlsx", b"PK", "its name must end in one of .csv, .tsv, .json, .jsonl"),
        ("a.parquet", b"PAR1", "is no .parquet file"),
        ("a.json", b"[1, 2]", "must hold a list of objects"),
        ("a.csv", b"", "is no .csv file (No columns to parse"),
        ("a.csv", b"prompt\n\xff\xfa\xff", "is not UTF-8 text: save it as UTF-8"),
        ("a.json", b"{", "is no .json file"),
        ("a.jsonl", b'{"prompt": "x"}\n{"pro', "is no .jsonl file"),
        ("a.csv", b"text\nx", "has no column prompt; it has text"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"prompt": {"a": 1}}', "row 1, prompt is an object, and must be text"),
        (
            "a.jsonl",
            b'{"prompt": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
            "row 1, prompt is a list of messages, but not of a single user turn",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, two_files, file, content, says):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    assert says in sentence_of(tmp_path, [*two_files, f"data.files.harmful={path}"])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_list_of_one_message_is_its_text(tmp_path, two_files, kind):
    """Also where a file of lines is called .json."""
    rows = [{"prompt": [{"role": "user", "content": f"{word(i)} zorp"}]} for i in range(30)]
    path = tmp_path / f"chat.{kind}"
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    lab = lab_of(tmp_path, [*two_files, f"data.files.harmful={path}"])
    assert all(row.prompt.endswith("ing zorp") for row in lab.rows("harmful_evaluation"))


def test_what_an_instruction_is_about_is_part_of_the_prompt(tmp_path, two_files):
    """Alpaca's input and Dolly's context."""
    rows = [r | {"about": "" if i else "This text."} for i, r in enumerate(answered("sum", 30))]
    path = tmp_path / "told.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    told = f"data.files.instructions={{path: {path}, context: about}}"
    found = lab_of(tmp_path, [*two_files, told]).rows("instructions")
    assert [row.prompt for row in found[:2]] == ["sum aaaing\n\nThis text.", "sum aabing"]
    paper = compose("paper").data.files
    assert (paper["instructions"]["context"], paper["dialogues"]["context"]) == ("input", "context")


def test_rows_without_an_answer_are_left_out_aloud(tmp_path, two_files, caplog):
    rows = [*answered("tell", 30), {"prompt": "tell nothing", "response": None}]
    with caplog.at_level("INFO", "ssah"):
        lab = lab_of(tmp_path, [*two_files, given(tmp_path, "dialogues", rows)])
        assert len(lab.rows("dialogues")) == 30
    assert "data.files.dialogues: rows without a prompt or response are left out: 1" in caplog.text


def test_the_number_to_find_is_the_last_of_a_worked_answer(tmp_path, two_files):
    rows = [{"prompt": f"{i} + 1?", "response": i + 1} for i in range(40)]  # numbers, not text
    found = lab_of(tmp_path, [*two_files, given(tmp_path, "arithmetic", rows)]).rows("arithmetic")
    assert [row.choices for row in found[:3]] == [("1",), ("2",), ("3",)]
    for answer in ("no idea", "12.50", ""):
        rows[5]["response"] = answer or "none."
        wrong = given(tmp_path, "arithmetic", rows)
        said = sentence_of(tmp_path, [*two_files, wrong])
        assert "the answer of arithmetic-00005 does not end in a whole number" in said
    for answer, found in (("so 10-5 is 5", "5"), ("= -7", "-7"), ("1,200.0", "1200")):
        rows[5]["response"] = answer
        lab = lab_of(tmp_path, [*two_files, given(tmp_path, "arithmetic", rows)])
        assert lab.rows("arithmetic")[5].choices == (found,)


def test_dialogues_of_one_prompt_leave_nothing_to_hold_out(tmp_path, two_files):
    rows = [{"prompt": "Go on.", "response": f"told {word(i)}"} for i in range(30)]
    lab = lab_of(tmp_path, [*two_files, given(tmp_path, "dialogues", rows)])
    arm = catalogue.unfrozen(lab, "dialogues")[0]
    with pytest.raises(SsahError, match="No held-out row of 'dialogues' has a prompt of its own"):
        measured(lab, [Measure(arm, "held-out gain", "dialogues")])


def test_too_few_rows_name_what_asks_for_them(tmp_path, two_files):
    overrides = [*two_files, "attribution.samples=500"]
    lab = lab_of(tmp_path, overrides)
    with pytest.raises(SsahError, match=r"ask for fewer \(align\.harmful"):
        lab.draw("harmful_attribution", lab.rows("harmful_attribution"), 500)


# --- through the command line ----------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Caches and results of commands go here, never to the user's."""
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    for module in ("app.study", "claims.table", "app.report", "app.commands"):
        monkeypatch.setattr(f"ssah.{module}.results_root", lambda: tmp_path / "results")
    return tmp_path / "results"


def test_without_dialogues_table_2_has_no_row_of_them(tmp_path, results, two_files):
    assert main(["table2", "profile=smoke", *two_files]) == 0
    (path,) = results.rglob("tables/table2.csv")
    assert set(pd.read_csv(path, keep_default_na=False)["attack"]) == {"", "instructions"}


def test_table_2_of_the_users_files(tmp_path, results, two_files):
    """With their dialogues, on their prompts; and without HarmBench, which they do not have."""
    dialogues = given(tmp_path, "dialogues", answered("tell", 40))
    assert main(["table2", "profile=smoke", *two_files, dialogues]) == 0
    (path,) = results.rglob("tables/table2.csv")
    found = pd.read_csv(path, keep_default_na=False)
    assert set(found["attack"]) == {"", "instructions", "dialogues"}
    assert "HarmBench" not in set(found["set"])
    assert set(found[found["metric"] == "ASR"]["n"]) == {8}


# --- what docs/tutorials/own_data.md says ----------------------------------------------------


def documented() -> list[str]:
    """The overrides of the command in docs/tutorials/own_data.md, as a shell would give them."""
    text = (project_root() / "docs" / "tutorials" / "own_data.md").read_text("utf-8")
    (command,) = re.findall(r"```bash\n(.venv/bin/ssah table1 data=files .*?)```", text, re.DOTALL)
    return shlex.split(command.replace("\\\n", " "))[2:]


@pytest.fixture
def documented_files(tmp_path, monkeypatch) -> None:
    """As many rows as the page asks for, in the folder that the command is called in."""
    monkeypatch.chdir(tmp_path)
    harmful = [f"{word(i)} {word(i + 400)}" for i in range(330)]
    (tmp_path / "my_prompts.csv").write_text("text\n" + "\n".join(harmful))
    benign = [{"instruction": f"do {word(i)} {word(i + 50)}", "output": "done"} for i in range(550)]
    (tmp_path / "my_answers.jsonl").write_text("\n".join(map(json.dumps, benign)))


def test_the_documented_command_finds_enough_rows_on_the_default_profile(
    tmp_path, documented_files
):
    lab = Lab(compose("laptop", documented()), Store(tmp_path / "runs"), 0)
    config = lab.config
    for name, count in (
        ("harmful_align", config.align.harmful),
        ("harmful_attribution", config.attribution.samples),
        ("benign_align", config.align.benign),
        ("benign_attribution", config.attribution.samples),
    ):
        assert len(lab.draw(name, lab.rows(name), count)) == count
    for name, count in (
        ("heldout_text", config.evaluate.perplexity_rows),
        ("arithmetic", config.evaluate.arithmetic_items),
        ("harmful_evaluation", config.probes.evaluation_queries),
    ):
        assert len(lab.first(name, count)) == count


def test_the_documented_command_runs(documented_files, results):
    assert main(["table1", "profile=smoke", *documented()]) == 0
    (path,) = results.rglob("tables/table1.csv")
    assert set(pd.read_csv(path)["n"].dropna()) >= {66}  # a fifth of the prompts
