"""One seed's laboratory: its sets, its models, and where their measurements are kept."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load_file

from ..core.errors import SsahError
from ..core.runtime import pick_device, pick_precision
from ..core.store import Handle, Store, digest
from ..data.rows import Row, read_set
from ..data.sets import build_sets, set_names
from ..scoring.attribution import ActivationStatistics
from ..training.ablation import ablate, patch
from ..training.adapter import Adapter
from ..training.settings import AlignConfig, TrainingConfig
from ..units.families import UnitKind
from ..units.layout import UnitLayout
from .config import Config, FinetuneConfig, model_config
from .load import Checkpoint, load_model, load_tokenizer, locate, shapes
from .specs import GIVEN, REFUSALS, Ablate, Model, Patch, Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Models in memory: the one that is measured, and those that it is compared with.
LOADED = 3


class Lab:
    """Sets, draws and models of one seed under one configuration.

    Nothing is computed before an output is read: stages (:mod:`ssah.lab.stages`) take the lab as
    their first argument.
    """

    def __init__(self, config: Config, store: Store, seed: int):
        self.config, self.store, self.seed = config, store, seed
        self.device = pick_device(config.runtime.device)
        self.precision = pick_precision(config.runtime.precision, self.device)
        self._loaded: OrderedDict[str, PreTrainedModel] = OrderedDict()
        # By id, since a mask has no hash; the models are kept so that no id is given twice.
        self._trainings: dict[int, tuple[Model, Handle]] = {}

    @property
    def only_headline(self) -> bool:
        """Whether this seed is measured for Table 1 and the main attack of Table 2 alone."""
        return self.seed >= self.config.seed + self.config.n_seeds

    # --- sets --------------------------------------------------------------------------------

    @functools.cached_property
    def sets(self) -> Handle:
        return build_sets(self.store, self.config.data)

    def has(self, name: str) -> bool:
        """Whether this data source has a set."""
        return name in set_names(self.config.data)

    @functools.cache  # noqa: B019 - a lab lives as long as its process
    def rows(self, name: str) -> tuple[Row, ...]:
        """The rows of a set."""
        return tuple(read_set(self.sets, name))

    def first(self, name: str, count: int) -> tuple[Row, ...]:
        """The first rows of a set; asking for more than there are is an error."""
        rows = self.rows(name)
        if count > len(rows):
            raise _too_few(name, rows, count)
        return rows[:count]

    def spread(self, name: str, count: int | None) -> tuple[Row, ...]:
        """Up to ``count`` rows of a set, evenly spread over it: the same for every seed."""
        rows = self.rows(name)
        count = len(rows) if count is None else min(count, len(rows))
        return tuple(rows[i * len(rows) // count] for i in range(count))

    def draw(self, purpose: str, rows: tuple[Row, ...], count: int) -> tuple[Row, ...]:
        """The seed's draw of ``count`` of these rows, one for each purpose."""
        if count > len(rows):
            raise _too_few(purpose, rows, count)
        return tuple(random.Random(f"{purpose}/{self.seed}").sample(rows, count))

    # --- the given model ---------------------------------------------------------------------

    @functools.cached_property
    def given(self) -> Checkpoint:
        return locate(self.store, self.config.model)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.given, self.config.model)

    @functools.cache  # noqa: B019 - a lab lives as long as its process
    def layout_of(self, unit_kind: UnitKind) -> UnitLayout:
        """The model's layout with one kind of unit; training changes no shape."""
        return UnitLayout.of(self.skeleton, unit_kind)

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model's layers without weights."""
        return shapes(self.store, self.given, self.config.model.name)

    @functools.cached_property
    def layout(self) -> UnitLayout:
        return self.layout_of(cast(UnitKind, self.config.attribution.unit_kind))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What shapes every stage beside its arguments."""
        model = self.config.model
        shaped = {
            "dtype": model.dtype,
            "attention": model.attn_implementation,
            "template": model.chat_template,
        }
        if self.precision != "float32":
            shaped["precision"] = self.precision
        if self.device.type != "cpu":
            shaped["device"] = self.device.type
        if self.config.data.source == "files":  # whose texts may change under the same names
            shaped["sets"] = self.sets.key
        # How prompts are rendered and where answers end; of the embedded models and the tiny one it
        # never changed what comes out.
        return shaped if model.source in ("embedded", "tiny") else {**shaped, "protocol": 3}

    # --- models ------------------------------------------------------------------------------

    @functools.cached_property
    def author(self) -> Lab:
        """The lab whose given model answers rows that have no response: this one, unless the
        configuration names another model. An aligned model that learns its own answers learns
        nothing, and stays as safe as it was."""
        name = self.config.finetune.answers_of
        if name is None:
            return self
        config = dataclasses.replace(self.config, model=model_config(name))
        return Lab(config, self.store, self.seed)

    @functools.cached_property
    def aligned(self) -> Model:
        """The model whose safety is studied: taught to refuse, or the given one if that is."""
        return GIVEN.trained(REFUSALS) if self.config.align.enabled else GIVEN

    def training(self, model: Model) -> Handle:
        """The run that trained a model."""
        from .stages.training import trained  # which stands on labs itself

        if id(model) not in self._trainings:
            assert isinstance(model.step, Train)
            assert model.base is not None
            made = trained(self, model.base, model.step)
            self._trainings[id(model)] = model, made
        return self._trainings[id(model)][1]

    def settings_of(self, step: Train) -> AlignConfig | FinetuneConfig:
        """The settings of a training."""
        from .stages.lessons import attack_rate  # which stands on labs itself

        config = self.config.align if step.rows == REFUSALS else self.config.finetune
        if step.rows != REFUSALS and "learning_rate" not in step.changes:
            config = dataclasses.replace(config, learning_rate=attack_rate(self))
        unknown = set(step.changes) - {f.name for f in dataclasses.fields(TrainingConfig)}
        if unknown:  # rows and responses belong to what is learned, not to one arm
            raise ValueError(f"A training cannot change {', '.join(sorted(unknown))}.")
        return dataclasses.replace(config, **step.changes)

    def epoch_of(self, step: Train) -> int:
        """After which epoch a model is meant."""
        return step.epoch or self.settings_of(step).epochs

    def identity(self, model: Model) -> str:
        """What tells a model from others in a key; nothing is trained to know it."""
        if model.step is None or model.base is None:
            return self.given.identity
        if isinstance(model.step, Train):
            return f"{self.training(model).key}/epoch-{self.epoch_of(model.step)}"
        step = model.step
        whose: Any = None
        if isinstance(step, Patch):
            whose = {"donor": self.identity(step.donor)}
        elif step.source is not None:
            whose = step.source.key if step.mode == "mean" else {step.mode: step.source.key}
        return digest([self.identity(model.base), step.mask.digest(), whose])

    def runs_of(self, model: Model) -> Iterator[str]:
        """Keys of the runs that a model's weights came out of."""
        if isinstance(model.step, Train):
            yield self.training(model).key
        elif model.base is not None:
            yield from self.runs_of(model.base)
            if isinstance(model.step, Patch):
                yield from self.runs_of(model.step.donor)

    def checkpoint(self, model: Model) -> Checkpoint:
        """Where a whole model's files are; it is trained first where there are none."""
        if not isinstance(model.step, Train):
            assert model.step is None, "an ablated model has no files of its own"
            return self.given
        folder = str(self.training(model).path(f"epoch-{self.epoch_of(model.step)}"))
        if isinstance(model.step.part, Adapter):
            assert model.base is not None
            base = self.checkpoint(model.base)
            return dataclasses.replace(base, identity=self.identity(model), adapter=folder)
        return Checkpoint(folder, self.identity(model))

    @contextmanager
    def use(self, model: Model) -> Iterator[PreTrainedModel]:
        """The model in memory; inside the block units that it lacks are silent, and patched ones
        say what they say in their donor."""
        loaded = self._load(model.whole)
        if isinstance(model.step, Ablate):
            step, constants, heard = model.step, None, None
            if step.mode == "mean" and step.source is not None:
                path = step.source.path("statistics.safetensors")
                constants = ActivationStatistics.load(path).mean
            elif step.mode == "fitted" and step.source is not None:
                constants = load_file(step.source.path("constants.safetensors"))
            elif step.mode == "resample" and step.source is not None:
                heard = load_file(step.source.path("activations.safetensors"))
            layout = self.layout_of(step.mask.unit_kind)
            with ablate(loaded, layout, step.mask, step.mode, constants, heard):
                yield loaded
        elif isinstance(model.step, Patch):
            mask, donor = model.step.mask, self._load(model.step.donor)
            with patch(loaded, self.layout_of(mask.unit_kind), mask, donor):
                yield loaded
        else:
            yield loaded

    def _load(self, model: Model) -> PreTrainedModel:
        """At most :data:`LOADED` models are kept, those that were used last."""
        identity = self.identity(model)
        if identity not in self._loaded:
            while len(self._loaded) >= LOADED:
                self._loaded.popitem(last=False)
            checkpoint = self.checkpoint(model)
            self._loaded[identity] = load_model(checkpoint, self.config.model, self.device)
        self._loaded.move_to_end(identity)
        return self._loaded[identity]

    def forget(self, model: Model) -> None:
        """Drop a trained model's weights, from memory and disk; what was measured stays."""
        for loaded in [key for key in self._loaded if key.startswith(self.training(model).key)]:
            del self._loaded[loaded]
        self.training(model).drop("epoch-*/*")


def _too_few(name: str, rows: Sequence[Row], count: int) -> SsahError:
    return SsahError(
        f"Set '{name}' has {len(rows)} rows but {count} are asked for: give more data, or ask for "
        "fewer (align.harmful, align.benign, attribution.samples, evaluate.*, probes.*)."
    )
