"""Stages: functions whose outputs are cached under what shaped them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from ..core.runtime import products_in
from ..core.store import Handle
from ..data.rows import Row
from ..units.mask import UnitMask
from .specs import Model

if TYPE_CHECKING:
    from .lab import Lab

P = ParamSpec("P")


def stage(
    name: str, *, version: int, resumable: bool = False
) -> Callable[[Callable[Concatenate[Lab, Path, P], None]], Callable[Concatenate[Lab, P], Handle]]:
    """Turn ``build(lab, folder, ...)``, which writes into the folder, into a cached function.

    Calling it builds nothing; what it returns is built when an output is read. The key is made of
    name and version, of what shapes every stage (:attr:`Lab.settings`), and of all other
    arguments: models by identity, handles by key, masks by digest, dataclasses by their fields. An
    argument named ``label`` only says which one it is in the folder's name. Increase the version
    when the same arguments give another output.
    """

    def decorate(
        build: Callable[Concatenate[Lab, Path, P], None],
    ) -> Callable[Concatenate[Lab, P], Handle]:
        signature = inspect.signature(build)

        @functools.wraps(build)
        def handle(lab: Lab, *args: P.args, **kwargs: P.kwargs) -> Handle:
            bound = signature.bind(lab, Path(), *args, **kwargs)
            bound.apply_defaults()
            given = dict(list(bound.arguments.items())[2:])
            label = given.pop("label", "")
            key = {name: identity(lab, value) for name, value in given.items()}

            def run(folder: Path) -> None:
                with products_in(lab.precision):
                    build(lab, folder, *args, **kwargs)

            return Handle(
                lab.store,
                f"{name}_{label}" if label else name,
                lab.config.model.name,
                {"version": version, **lab.settings, **key},
                run,
                tuple(key for value in given.values() for key in inputs(lab, value)),
                resumable,
            )

        return handle

    return decorate


def identity(lab: Lab, value: Any) -> Any:
    """What stands for an argument in a key, as JSON."""
    if isinstance(value, Model):
        return lab.identity(value)
    if isinstance(value, Handle):
        return value.key
    if isinstance(value, UnitMask):
        return value.digest()
    if isinstance(value, Row):
        return [value.prompt, value.response, *value.choices]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: identity(lab, part) for name, part in fields}
    if isinstance(value, Mapping):
        return {str(key): identity(lab, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(lab, part) for part in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"A {type(value).__name__} cannot be part of a key.")


def inputs(lab: Lab, value: Any) -> Iterator[str]:
    """Keys of the runs in an argument."""
    if isinstance(value, Handle):
        yield value.key
    elif isinstance(value, Row):
        return
    elif isinstance(value, Model):
        yield from lab.runs_of(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from inputs(lab, getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from inputs(lab, part)
