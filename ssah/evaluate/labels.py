"""Labelled completions: reading other people's files, and how well the judges agree with labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..core.errors import SsahError, suggestion
from ..core.paths import reference
from .judges import VERDICTS, Completion, judge
from .stats import proportion

#: Start of a label, in lower case and without leading digits -> what it means. Labels of data sets
#: that know refusals only, such as XSTest's, say nothing about *answered*.
_MEANINGS = {
    "refus": "refused", "full_refus": "refused", "partial_refus": "refused", "reject": "refused",
    "decline": "refused", "evad": "evaded", "evasi": "evaded", "answer": "answered",
    "incoher": "incoherent", "compl": "not refused", "full_compl": "not refused",
    "not_refus": "not refused", "not refus": "not refused", "non_refus": "not refused",
}  # fmt: skip


def key(completion: Completion) -> str:
    """What a label is filed under: a hash of prompt and text, so that no text is committed."""
    return hashlib.sha256(f"{completion.prompt}\n{completion.text}".encode()).hexdigest()[:16]


def known_labels() -> pd.DataFrame:
    """Our labels (docs/judging.md): ``key, model, arm, set, half, label, again, judged``."""
    return pd.read_csv(reference("labels.csv"), keep_default_na=False)


def meaning(label: object) -> str:
    """A verdict, or ``not refused``; :class:`SsahError` for a word that is neither."""
    word = str(label).strip().lower().lstrip("0123456789_.- ")
    fitting = [name for start, name in _MEANINGS.items() if word.startswith(start)]
    if not fitting:
        raise SsahError(
            f"The label '{label}' is unknown: use {', '.join(VERDICTS)}, or refused and complied."
        )
    return fitting[0]


def read_labelled(
    path: Path, text: str, label: str, prompt: str | None
) -> tuple[list[Completion], list[str]]:
    """Completions and the meaning of their labels, out of a CSV or JSONL file.

    ``prompt`` None takes the column "prompt" where there is one, and no prompts otherwise.
    Raises :class:`SsahError` for a file or column that is not there, and for empty cells.
    """
    if not path.is_file():
        raise SsahError(f"There is no file {path}.")
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            frame = pd.read_json(path, lines=True, dtype=False)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SsahError(f"{path} is no CSV (or JSONL) file in UTF-8: {reason}") from error
    if prompt is None and "prompt" in frame.columns:
        prompt = "prompt"
    for column in (text, label, *([prompt] if prompt else [])):
        if column not in frame.columns:
            hint = suggestion(column, [str(c) for c in frame.columns])
            raise SsahError(f"{path} has no column '{column}'{hint}")
    if frame.empty:
        raise SsahError(f"{path} has no rows.")
    empty = frame[label].isna() | (frame[label].astype(str).str.strip() == "")
    if empty.any():
        raise SsahError(f"{path} has no label in row {int(empty.argmax()) + 1}, column '{label}'.")
    prompts = frame[prompt].fillna("").astype(str) if prompt else [""] * len(frame)
    texts = frame[text].fillna("").astype(str)
    completions = [Completion(p, t) for p, t in zip(prompts, texts, strict=True)]
    return completions, [meaning(value) for value in frame[label]]


def agreement(labels: Sequence[str], verdicts: Sequence[str]) -> pd.DataFrame:
    """Accuracy (95 % interval), Cohen's kappa, precision and recall by verdict, one row each.

    Verdicts that these labels cannot decide are left out: *answered* needs labels that tell it
    from *evaded*.
    """
    from sklearn.metrics import cohen_kappa_score

    decided = [
        v for v in VERDICTS if v in labels and (v == "refused" or "not refused" not in labels)
    ]
    rows = []
    for verdict in decided:
        wanted = [label == verdict for label in labels]
        given = [v == verdict for v in verdicts]
        both = sum(a and b for a, b in zip(wanted, given, strict=True))
        right = proportion([a == b for a, b in zip(wanted, given, strict=True)])
        # Where both are of one kind kappa is not defined: they agree in everything or in nothing.
        several = len({*wanted, *given}) > 1
        kappa = cohen_kappa_score(wanted, given) if several else 1.0
        rows.append(
            {
                "verdict": verdict,
                "labelled": sum(wanted),
                "judged": sum(given),
                "accuracy": right.value,
                "low": right.low,
                "high": right.high,
                "kappa": kappa,
                "precision": both / sum(given) if any(given) else float("nan"),
                "recall": both / sum(wanted),
                "n": right.n,
            }
        )
    return pd.DataFrame(rows)


def confusion(labels: Sequence[str], verdicts: Sequence[str]) -> pd.DataFrame:
    """Counts: a row for each label, a column for each verdict of the judges."""
    table = pd.crosstab(pd.Series(labels, name="label"), pd.Series(verdicts, name="judged"))
    return table.reindex(columns=list(VERDICTS), fill_value=0)


def judged(completions: Sequence[Completion]) -> list[str]:
    return [judge(c) for c in completions]


def errors_of_answered(model: str) -> tuple[list[bool], list[bool]]:
    """For labels of the test half: whether *answered* was found where it is, and whether it was
    not where it is not. Of one model's completions, or of all where the model has no labels."""
    known = known_labels()
    tested = known[known["half"] == "test"]
    if model in set(tested["model"]):
        tested = tested[tested["model"] == model]
    is_answer, said = tested["label"] == "answered", tested["judged"] == "answered"
    return said[is_answer].to_list(), (~said[~is_answer]).to_list()
