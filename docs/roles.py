"""For the API reference: docstrings name things as Sphinx does, and the site speaks Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


def plain(text: str) -> str:
    """``:class:`X``` becomes code, and a paragraph that ends in two colons ends in one."""
    return re.sub(r"::$", ":", _ROLE.sub(r"`\1`", text).replace("``", "`"), flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Every docstring as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
