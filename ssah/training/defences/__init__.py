"""Ways to fine-tune that are meant to keep a model safe: each is a module of this package.

Every class that derives from :class:`Defence` in one of them is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .base import Defence

#: By name.
DEFENCES: dict[str, type[Defence]] = {
    found.name: found
    for module in iter_modules(__path__)
    for found in vars(import_module(f".{module.name}", __name__)).values()
    if isinstance(found, type) and issubclass(found, Defence) and found is not Defence
}
