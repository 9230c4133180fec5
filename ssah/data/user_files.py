"""Sets from the user's own files (JSON, JSONL, CSV) or from the hub."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import SsahError
from .rows import OPTIONAL_SETS, SETS, Row
from .settings import DataConfig
from .split import divide_benign, divide_harmful


def sets_from_files(config: DataConfig) -> dict[str, list[Row]]:
    """Sets given by the user as local JSON(L)/CSV or hub names.

    ``harmful`` and ``benign`` are divided into parts; any other set is taken as it is.
    """
    given = {name: spec for name, spec in config.files.items() if spec}
    for name in ("harmful", "benign"):
        if name not in given:
            raise SsahError(f"data.source=files needs data.files.{name} with a path and columns.")
    loaded = {name: _load_file(name, spec) for name, spec in given.items()}
    harmful, benign = loaded.pop("harmful"), loaded.pop("benign")
    answered = [row for row in benign if row.response]
    if len(answered) < 400:
        raise SsahError("data.files.benign needs at least 400 rows with a response.")
    heldout = {row.id for row in answered[:200]}
    return {
        **divide_harmful(harmful, config),
        **divide_benign([row for row in benign if row.id not in heldout]),
        "heldout_text": answered[:200],
        **{name: rows for name, rows in loaded.items() if name in SETS | OPTIONAL_SETS},
    }


@dataclass(frozen=True)
class FileSource:
    """One entry of ``data.files``: where a set is and which columns it has."""

    path: str
    prompt: str
    response: str | None = None
    category: str | None = None
    licence: str = "unstated"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    gated: bool = False
    limit: int | None = None


def _load_file(name: str, spec: dict[str, Any]) -> list[Row]:
    try:
        source = FileSource(**spec)
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(FileSource))
        raise SsahError(
            f"data.files.{name} needs path and prompt, and may have only {fields}."
        ) from error
    import datasets
    from huggingface_hub import get_token

    local = Path(source.path)
    if source.gated and not local.exists() and not get_token():
        raise SsahError(
            f"{source.path} is gated: accept its terms on its hub page and run `hf auth login`, "
            f"or set data.files.{name}.path to a copy that you have on disk."
        )
    try:
        if local.exists():
            kind = "csv" if local.suffix == ".csv" else "json"
            table = datasets.load_dataset(kind, data_files=str(local), split="train")
        else:
            table = datasets.load_dataset(
                source.path, source.subset, split=source.split, revision=source.revision
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise SsahError(
            f"data.files.{name}: {source.path} cannot be loaded ({reason}): check the path or "
            "name, and the network (HF_HUB_OFFLINE=1 forbids downloads)."
        ) from error
    missing = {c for c in (source.prompt, source.response, source.category) if c} - set(
        table.column_names
    )
    if missing:
        raise SsahError(
            f"data.files.{name}: {source.path} has no column {', '.join(sorted(missing))}; it has "
            f"{', '.join(table.column_names)}."
        )
    table = table.select(range(min(source.limit or len(table), len(table))))
    return [
        Row(
            f"{name}-{i:05}",
            str(record[source.prompt]),
            source.path,
            source.licence,
            str(record[source.category]) if source.category else "",
            record[source.response] if source.response else None,
        )
        for i, record in enumerate(table)
        if record[source.prompt]
    ]
