"""Sets from the user's own files (JSON, JSONL, CSV, TSV, Parquet) or from the hub."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InvalidValueError, SsahError, suggestion
from .rows import Row
from .settings import DataConfig
from .split import divide_benign, divide_harmful, grouped, normalised

logger = logging.getLogger(__name__)

#: What the user may bring, and whether it has answers.
ANSWERED = {
    "harmful": False,
    "benign": True,
    "dialogues": True,
    "instructions": True,
    "arithmetic": True,
    "harmbench": False,
    "hexphi": False,
    "do_not_answer": False,
}

#: Benign rows with an answer that are kept for perplexity.
HELD_OUT = 200


@dataclass(frozen=True)
class FileSource:
    """One entry of ``data.files``: where a set is and which columns it has."""

    path: str
    prompt: str = "prompt"
    response: str | None = None
    context: str | None = None  #: put below the prompt: Alpaca's ``input``, Dolly's ``context``
    category: str | None = None
    licence: str = "unstated"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    gated: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        named = [self.prompt, self.response or "", self.context or "", self.category or ""]
        if not all(isinstance(text, str) for text in (self.path, *named)) or not self.prompt:
            raise TypeError("A path and the names of columns are texts.")
        if self.limit is not None and not (isinstance(self.limit, int) and self.limit > 0):
            raise TypeError("A limit is a number of rows.")

    @property
    def local(self) -> Path | None:
        """The file, where it is one."""
        path = Path(self.path).expanduser()
        return path if path.is_file() else None


def file_sources(config: DataConfig) -> dict[str, FileSource]:
    """What ``data.files`` names, set by set; :class:`SsahError` for what it cannot name.

    A bare path stands for a file with the columns ``prompt`` and, in sets with answers,
    ``response``.
    """
    found = {}
    for name, given in config.files.items():
        if not given:
            continue
        if name not in ANSWERED:
            raise InvalidValueError(
                f"data.files.{name}: no such set{suggestion(name, [*ANSWERED])}"
            )
        columns = {"path": given} if isinstance(given, str) else given
        if ANSWERED[name] and isinstance(columns, Mapping):
            columns = {"response": "response", **columns}
        try:
            found[name] = FileSource(**columns)
        except TypeError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(FileSource))
            raise InvalidValueError(
                f"data.files.{name} takes a path and names of columns, each of them a text; its "
                f"keys are {fields}."
            ) from error
        if ANSWERED[name] and not found[name].response:
            raise InvalidValueError(f"data.files.{name} needs a column of responses.")
    for name in ("harmful", "benign"):
        if name not in found:
            raise InvalidValueError(
                f"data.source=files needs data.files.{name}: a path, and the names of its columns."
            )
    return found


def sets_from_files(config: DataConfig) -> dict[str, list[Row]]:
    """Sets given by the user as local files or hub names.

    ``harmful`` and ``benign`` are divided into parts; any other set is taken as it is.
    """
    loaded = {name: _rows(name, source) for name, source in file_sources(config).items()}
    harmful, benign = loaded.pop("harmful"), loaded.pop("benign")
    if len(benign) < 2 * HELD_OUT:
        raise SsahError(
            f"data.files.benign has {len(benign)} rows with a prompt and a response, and needs "
            f"{2 * HELD_OUT}: {HELD_OUT} of them are kept for perplexity."
        )
    heldout: list[Row] = []
    groups = grouped(benign, config.near_duplicate)
    while len(heldout) < HELD_OUT:  # the first ones, with whatever nearly equals one of them
        heldout += groups.pop(0)
    if "arithmetic" in loaded:
        loaded["arithmetic"] = [_with_result(row) for row in loaded["arithmetic"]]
    divided = divide_benign(groups)
    measured = {normalised(r.prompt) for part in (heldout, *divided.values()) for r in part}
    for name in {"instructions", "dialogues"} & {*loaded}:  # may come out of the same file
        loaded[name] = [r for r in loaded[name] if normalised(r.prompt) not in measured]
    return {
        **divide_harmful(harmful, config),
        **divided,
        "heldout_text": heldout,
        **loaded,
    }


def _with_result(row: Row) -> Row:
    """The last number of a worked answer is the one to find; it is a whole one."""
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", (row.response or "").replace(",", ""))
    whole = re.fullmatch(r"(-?\d+)(\.0+)?", numbers[-1]) if numbers else None
    if whole is None:
        raise SsahError(
            f"data.files.arithmetic: the answer of {row.id} does not end in a whole number."
        )
    return dataclasses.replace(row, choices=(whole[1],))


def _rows(name: str, source: FileSource) -> list[Row]:
    """The rows of a set that have what it needs; the others are left out, which is said."""
    records = (
        local_records(f"data.files.{name}", source.local)
        if source.local
        else _hub_records(name, source)
    )
    wanted = [c for c in (source.prompt, source.response, source.context, source.category) if c]
    columns = list(records[0]) if records else []
    missing = sorted(set(wanted) - set(columns))
    if missing:
        has = f"it has {', '.join(columns)}" if columns else "it is empty"
        raise SsahError(
            f"data.files.{name}: {source.path} has no column {', '.join(missing)}; {has}."
        )
    rows = []
    for number, record in enumerate(records[: source.limit]):
        text = {c: _text(record[c], f"data.files.{name}, row {number + 1}, {c}") for c in wanted}
        prompt = text[source.prompt]
        response = text[source.response] if source.response else None
        if not prompt or response == "":
            continue
        if source.context and text[source.context]:
            prompt += f"\n\n{text[source.context]}"
        category = text[source.category] if source.category else ""
        rows.append(
            Row(f"{name}-{number:05}", prompt, source.path, source.licence, category, response)
        )
    left_out = len(records[: source.limit]) - len(rows)
    if left_out:
        needs = "prompt or response" if source.response else "prompt"
        logger.info("data.files.%s: rows without a %s are left out: %d", name, needs, left_out)
    return rows


def _text(value: Any, where: str) -> str:
    """A cell as text; a list of chat messages stands for its only user turn."""
    if value is None or value != value:  # a NaN
        return ""
    if isinstance(value, list):
        said = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == "user"]
        if len(said) != 1 or len(value) > 1:
            raise SsahError(
                f"{where} is a list of messages, but not of a single user turn: give prompt and "
                "response as columns of text."
            )
        (value,) = said
    if isinstance(value, dict):
        raise SsahError(f"{where} is an object, and must be text.")
    return str(value).strip()


# --- reading ---------------------------------------------------------------------------------


def local_records(what: str, path: Path) -> list[dict[str, Any]]:
    """The records of a file; every cell of a CSV file is text, also ``NA`` and ``007``.

    Raises :class:`SsahError`, which begins with ``what``, for a file that cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise SsahError(
            f"{what}: {path} cannot be read: its name must end in one of {', '.join(READERS)}."
        )
    try:
        found = READERS[kind](path)
    except UnicodeDecodeError as error:
        raise SsahError(f"{what}: {path} is not UTF-8 text: save it as UTF-8.") from error
    except (ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise SsahError(f"{what}: {path} is no {kind} file ({reason}).") from error
    if not all(isinstance(record, dict) for record in found):
        raise SsahError(f"{what}: {path} must hold a list of objects.")
    return found


def _read_table(path: Path, separator: str) -> list[dict[str, Any]]:
    import pandas as pd

    table = pd.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False, encoding=_encoding(path)
    )
    return table.to_dict("records")


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects, or one object a line, whatever the file is called."""
    text = path.read_text(_encoding(path))
    try:
        whole = json.loads(text)
    except ValueError:
        return [_record(line, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _record(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


#: Ending of a file's name -> what reads it.
READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": functools.partial(_read_table, separator=","),
    ".tsv": functools.partial(_read_table, separator="\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".parquet": _read_parquet,
}


def _encoding(path: Path) -> str:
    """UTF-16 where a byte order mark says so, else UTF-8."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _hub_records(name: str, source: FileSource) -> list[dict[str, Any]]:
    looks_local = Path(source.path).suffix.lower() in READERS
    if looks_local or source.path.startswith(("/", ".", "~")):
        raise SsahError(f"data.files.{name}: there is no file {source.path}.")
    import datasets
    from huggingface_hub import get_token

    if source.gated and not get_token():
        raise SsahError(
            f"{source.path} is gated: accept its terms on its hub page and run `hf auth login`, "
            f"or set data.files.{name}.path to a copy that you have on disk."
        )
    try:
        table = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise SsahError(
            f"data.files.{name}: {source.path} cannot be loaded ({reason}): check the path or "
            "name, and the network (HF_HUB_OFFLINE=1 forbids downloads)."
        ) from error
    return table.select(range(min(source.limit or len(table), len(table)))).to_list()
