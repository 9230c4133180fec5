"""Rows to fine-tune on, in whatever shape they come: what is in them is found out and said.

Known are a prompt and a response (under several names), Alpaca's and Dolly's columns, lists of chat
messages (``role`` and ``content``) and ShareGPT's conversations (``from`` and ``value``).
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import SsahError
from .split import content_words
from .user_files import READERS, local_records

#: Columns of a prompt and its response, the likeliest first.
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)

#: Columns of what is put below an instruction: Alpaca's and Dolly's.
CONTEXTS = ("input", "context")

#: Columns of whole chats.
CHATS = ("messages", "conversations", "conversation")

#: Who speaks, as OpenAI's messages and ShareGPT's have it.
SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

#: What a record is read as: a dialogue, or what is wrong with it.
Reader = Callable[[Mapping[str, Any]], "Dialogue | str"]

#: More rows than one in so many that cannot be used are taken for a mistake.
BROKEN = 10

#: Fewer teach nothing, and leave too few to measure on.
FEWEST = 20


@dataclass(frozen=True)
class Dialogue:
    """What is learned is the response; the rest is what it answers."""

    prompt: str
    response: str
    system: str = ""
    before: tuple[tuple[str, str], ...] = ()  #: earlier turns, each a prompt and its answer


@dataclass(frozen=True)
class Found:
    """Rows, and what was made of the file that they are from."""

    dialogues: tuple[Dialogue, ...]
    shape: str  #: in words, with the names of the columns
    broken: int  #: rows that were left out

    def __str__(self) -> str:
        longer = sum(bool(d.before) for d in self.dialogues)
        said = [f"{len(self.dialogues)} rows of {self.shape}"]
        if longer:
            said.append(f"{longer} of several turns, of which the last answer is learned")
        if self.broken:
            said.append(f"{self.broken} without a prompt or a response, which are left out")
        return "; ".join(said)


def find_dialogues(rows: str | Path | Iterable[Any]) -> Found:
    """Rows out of a file, or out of a list of records or of (prompt, response) pairs.

    Raises :class:`SsahError` where nothing can be made of them, where more than a tenth cannot be
    used, and where fewer than :data:`FEWEST` are left.
    """
    if isinstance(rows, str | Path):
        name, records = str(rows), _records(Path(rows).expanduser())
    else:
        name = "The rows"
        records = [_as_record(row) for row in rows]
    if not records:
        raise SsahError(f"{name}: there is no row in it.")
    columns = list(dict.fromkeys(column for record in records[:100] for column in record))
    shape, read = _shape(name, columns)
    dialogues, faults = [], []
    for number, record in enumerate(records, 1):
        found = read(record)
        if isinstance(found, Dialogue):
            dialogues.append(found)
        else:
            faults.append(f"row {number} {found}")
    if len(faults) * BROKEN > len(records):
        raise SsahError(
            f"{name}: {len(faults)} of {len(records)} rows cannot be used ({faults[0]}); taken as "
            f"{shape}."
        )
    if len(dialogues) < FEWEST:
        raise SsahError(
            f"{name}: {len(dialogues)} rows are too few to learn from and to measure on; "
            f"{FEWEST} are needed, and some hundreds are usual."
        )
    return Found(tuple(dialogues), shape, len(faults))


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SsahError(f"There is no file {path}: rows are a file ({', '.join(READERS)}).")
    if path.stat().st_size == 0:
        raise SsahError(f"{path} is empty.")
    return local_records("The rows", path)


def _as_record(row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    if isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
        return dict(zip(PAIRS[0], row, strict=True))
    raise SsahError("A row is a (prompt, response) pair or a dictionary of columns.")


def _shape(name: str, columns: Sequence[str]) -> tuple[str, Reader]:
    """What the columns are, in words, and what reads a record of them."""
    chat = next((c for c in CHATS if c in columns), None)
    if chat is not None:
        return f"chats (column {chat})", lambda record: _chat(record.get(chat))
    pair = next((p for p in PAIRS if {*p} <= {*columns}), None)
    if pair is None:
        known = "; ".join([*(" + ".join(pair) for pair in PAIRS), *CHATS])
        has = ", ".join(map(str, columns))
        raise SsahError(f"{name}: the columns {has} are none of those that are known: {known}.")
    below = CONTEXTS if pair[0] == "instruction" else ()
    context = next((c for c in below if c in columns), None)
    used = [pair[0], *([context] if context else []), pair[1]]
    return (
        f"prompts and responses (columns {', '.join(used)})",
        functools.partial(_pair, names=pair, context=context),
    )


def _pair(record: Mapping[str, Any], names: tuple[str, str], context: str | None) -> Dialogue | str:
    prompt, response = names
    asked, answered = record.get(prompt), record.get(response)
    if isinstance(asked, list):  # as messages, and the answer as messages or as text
        said = (
            answered if isinstance(answered, list) else [{"role": "assistant", "content": answered}]
        )
        return _chat([*asked, *said])
    below = _text(record.get(context)) if context else ""
    text = "\n\n".join(part for part in (_text(asked), below) if part)
    if not text or not _text(answered):
        return f"has no {prompt if not text else response}"
    return Dialogue(text, _text(answered), _text(record.get("system")))


def _chat(messages: Any) -> Dialogue | str:
    """The last answer of a chat, behind the turns before it."""
    if isinstance(messages, str):  # out of a table, where a cell is text
        try:
            messages = json.loads(messages)
        except ValueError:
            return "holds no list of messages"
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "holds no list of messages"
    turns = []
    for message in messages:
        speaker = message.get("role", message.get("from"))
        if speaker not in SPEAKERS:
            return f"has a message of '{speaker}', who is none of {', '.join(SPEAKERS)}"
        turns.append((SPEAKERS[speaker], _text(message.get("content", message.get("value")))))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    while turns and turns[-1][0] == "user":
        turns.pop()
    said = [text for _, text in turns]
    alternating = [who for who, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    if not turns or not alternating:
        return "does not go from user to assistant and back"
    if not all(said):
        return "has an empty message"
    pairs = list(zip(said[::2], said[1::2], strict=True))
    return Dialogue(*pairs[-1], system=system, before=tuple(pairs[:-1]))


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(p, dict) and "text" in p for p in value):
        value = "".join(str(part["text"]) for part in value)  # OpenAI's parts of a message
    if value is None or isinstance(value, (list, dict)) or value != value:  # a NaN
        return ""
    return str(value).strip()


def near(prompts: Sequence[str], others: Sequence[str], threshold: float) -> list[bool]:
    """Per prompt: does it share most of its content words with one of the others?

    Jaccard similarity of at least ``threshold``, as in :func:`ssah.data.split.similarity`, by an
    index of words, since the user may bring many rows.
    """
    sets = [content_words(text) for text in others]
    holders: dict[str, list[int]] = collections.defaultdict(list)
    for i, words in enumerate(sets):
        for word in words:
            holders[word].append(i)
    found = []
    for prompt in prompts:
        words = content_words(prompt)
        shared = collections.Counter(i for word in words for i in holders.get(word, ()))
        found.append(
            any(n / (len(words) + len(sets[i]) - n) >= threshold for i, n in shared.items())
        )
    return found
