"""Commands with options of their own: agreement with labels, and completions to read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from .config import check_keys, split_profile
from .errors import SsahError
from .progress import show_progress


class _Parser(argparse.ArgumentParser):
    """Bad words are one sentence, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise SsahError(f"{self.prog}: {message}; see {self.prog} --help.")


def judge(arguments: list[str]) -> int:
    """Agreement of the judges with somebody's labels, on standard output."""
    parser = _Parser(prog="ssah judge", description="How the judges agree with labels.")
    parser.add_argument("file", type=Path, help="CSV or JSONL with one completion a row")
    parser.add_argument("--text", required=True, help="column of the completions")
    words = "refused, evaded, answered, incoherent; or refusal and compliance"
    parser.add_argument("--label", required=True, help=f"column of the labels: {words}")
    parser.add_argument("--prompt", help="column of the prompts (default: prompt, if it exists)")
    options = parser.parse_args(arguments)
    from .labels import agreement, confusion, judged, read_labelled

    completions, labels = read_labelled(options.file, options.text, options.label, options.prompt)
    verdicts = judged(completions)
    print(agreement(labels, verdicts).to_string(index=False, float_format="{:.3f}".format))
    print()
    print(confusion(labels, verdicts).to_string())
    if not any(c.prompt for c in completions):
        print("\nThere are no prompts, so answered and evaded cannot be told apart: name --prompt.")
    return 0


def read(arguments: list[str]) -> int:
    """Random completions with their verdicts, on a terminal only: they may be harmful."""
    parser = _Parser(prog="ssah read", description="Random completions of an arm, with verdicts.")
    parser.add_argument("arm", nargs="?", help="name of a headline arm; without one, all names")
    parser.add_argument("overrides", nargs="*", help="profile=... and Hydra overrides")
    parser.add_argument("--n", type=int, default=20, help="how many")
    options = parser.parse_args(arguments)
    if options.n < 1:
        raise SsahError(f"--n {options.n}: at least one completion has to be read.")
    words = [*([options.arm] if options.arm else []), *options.overrides]
    overrides = [w for w in words if re.match(r"[\w./]+=", w)]
    names = [w for w in words if w not in overrides]
    check_keys(overrides)
    profile, overrides = split_profile(overrides)
    from .evaluate import judges
    from .reading import headline_arms, random_completions
    from .study import Study

    show_progress()
    stages = Study(profile, overrides).all_stages[0]
    if not names:
        print("\n".join(headline_arms(stages)))
        return 0
    for completion in random_completions(stages, names[0], options.n):
        phrase = "no refusal phrase" if judges.not_refused([completion])[0] else "-"
        print(
            f"[{judges.judge(completion)}; {phrase}] {completion.prompt}\n    {completion.text}\n"
        )
    return 0
