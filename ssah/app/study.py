"""A study: one configuration, its seeds, and the artefacts that notebooks show."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from ..artefacts import Artefact, find
from ..artefacts.render import write_output, write_times
from ..claims.table import claims_table, styled, update_claims
from ..core.errors import SsahError
from ..core.paths import home, results_root
from ..core.progress import in_notebook, show_progress
from ..core.runtime import commit
from ..core.store import Store, digest
from ..lab.config import Config, compose
from ..lab.stages import Stages


class Study:
    """Profile and Hydra overrides, composed; stages by seed; where results go.

    ``only`` restricts :meth:`show` to some artefacts (all where empty). Results go to
    ``results/<profile>``, or with overrides to ``results/<profile>/<overrides>``, so that runs of
    different settings never mix.
    """

    def __init__(
        self,
        profile: str = "laptop",
        overrides: Sequence[str] = (),
        only: Sequence[str] = (),
        results: Path | None = None,
    ):
        if in_notebook():
            show_progress()
            pd.set_option("display.max_colwidth", None)  # claims are sentences
        self.overrides = [o for o in overrides if not o.startswith("runtime.")]
        self.config: Config = compose(profile, list(overrides))
        self.only = tuple(only)
        self.store = Store(home() / "runs")
        self.results = results or results_root() / profile / slug(self.overrides)
        if self.config.runtime.threads:
            torch.set_num_threads(self.config.runtime.threads)

    @property
    def seeds(self) -> list[int]:
        return list(range(self.config.seed, self.config.seed + self.config.n_seeds))

    @property
    def headline_stages(self) -> list[Stages]:
        """Of Table 1 and the main attack of Table 2, which may be measured for more seeds."""
        count = max(self.config.n_seeds, self.config.headline_seeds)
        return [self.stages(self.config.seed + i) for i in range(count)]

    @functools.cache  # noqa: B019 - one study lives as long as its process
    def stages(self, seed: int) -> Stages:
        """The stages of one seed; what is loaded or read stays in memory."""
        return Stages(self.config, self.store, seed)

    @property
    def all_stages(self) -> list[Stages]:
        return [self.stages(seed) for seed in self.seeds]

    @property
    def stamp(self) -> dict[str, Any]:
        """What every artefact says about its origin."""
        return {
            "profile": self.config.name,
            "model": self.config.model.name,
            "seeds": " ".join(map(str, self.seeds)),
            "overrides": " ".join(self.overrides),
            "config": digest(asdict(self.config))[:10],
            "commit": commit(),
        }

    @functools.cached_property
    def earlier(self) -> pd.DataFrame | None:
        """All metrics of the run that this one adds to, ``seed`` as text; None where it adds to
        none."""
        if self.config.add_to is None:
            return None
        path = results_root() / self.config.add_to / "metrics.csv"
        if not path.exists():
            raise SsahError(f"add_to={self.config.add_to}: there is no {path} to add to.")
        return pd.read_csv(path, dtype={"seed": str, "seeds": str})

    def show(self, artefact: str) -> Any:
        """Compute (or read) an artefact, write its files, and return its table or figure.

        Returns None where ``only`` leaves the artefact out.
        """
        found = find(artefact)
        if self.only and artefact not in self.only:
            return None
        return produce(self, found)

    def claims(self, artefact: str | None = None) -> Any:
        """The claims table, or its rows that rest on one artefact."""
        table = claims_table(self.results)
        return styled(table if artefact is None else table[table["artefact"] == artefact])


def produce(study: Study, artefact: Artefact) -> pd.DataFrame | Figure:
    """Run an artefact's function and write its files, metrics and claims."""
    store = study.store
    store.touched.clear()
    start, built = time.monotonic(), store.built_seconds
    output = artefact.compute(study)
    warm = time.monotonic() - start - (store.built_seconds - built)
    write_output(study, artefact, output)
    runs = {run.key: run.seconds for run in store.touched.values()}
    write_times(study, artefact, runs, warm)
    update_claims(study.results)
    shown = output.figure if output.figure is not None else output.table
    assert shown is not None
    return shown


def slug(overrides: Sequence[str]) -> str:
    """A folder name for some overrides; long ones are cut and hashed."""
    text = ",".join(sorted(overrides)).replace("/", "-").replace(" ", "")
    return text if len(text) <= 80 else f"{text[:60]}-{digest(text)[:10]}"
