"""Configuration: typed dataclasses for each stage, composed by Hydra from ``conf/``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..core.errors import InvalidValueError, SsahError, require_known, suggestion
from ..core.paths import conf_dir
from ..core.valid import all_within, check, one_of, require_word, some_of, within, within_each
from ..data.settings import DataConfig, ModelConfig
from ..scoring.settings import VarianceOver
from ..text.settings import Tokens
from ..training.settings import AlignConfig, TrainingConfig
from ..units.families import BlockKind, UnitKind


@dataclass
class FinetuneConfig(TrainingConfig):
    """Harmless fine-tuning of the aligned model, with some units frozen or none.

    The rate is constant after the warm-up, so that the model after one epoch of a longer run is
    the model of a run of one epoch. ``epochs`` is the length of the longest run.
    """

    epochs: int = within(2, 1)
    #: learning rates to try on the arm that freezes nothing, weakest first; none: learning_rate
    rates: list[float] = all_within([], 1e-8, 1)
    rows: dict[str, int] = within_each(1)  #: attack -> rows to train on
    heldout_rows: int = within(32, 1)  #: of the attack's set, never trained on
    answers_of: str | None = None  #: the model (of conf/model) that answers rows without a response
    max_response_tokens: int = within(24, 1)


@dataclass
class AttributionConfig:
    """Statistics and score of eq. 1."""

    samples: int = within(120, 2)
    max_response_tokens: int = within(48, 1)
    tokens: str = one_of("response", *get_args(Tokens))
    drop_first: bool = False  #: with ``tokens=all``: leave out the first position
    variance_over: str = one_of("token", *get_args(VarianceOver))
    unit_kind: str = one_of("head", *get_args(UnitKind))
    batch_size: int = within(16, 1)


@dataclass
class RolesConfig:
    """Shares to try, and what the removal of a group must do to be accepted.

    One share in a list fixes it. ASR limits are differences to the whole model; perplexity
    limits are ratios to it. ``redundant_kinds`` are the kinds of units that may be RU.
    """

    redundant_kinds: list[str] = some_of(*get_args(BlockKind))
    ru_shares: list[float] = all_within([0.25, 0.2, 0.15, 0.1, 0.05], 0, 1, fewest=1)
    esu_shares: list[float] = all_within([0.03, 0.02, 0.013, 0.01, 0.005], 0, 1, fewest=1)
    euu_shares: list[float] = all_within([0.15, 0.1, 0.05], 0, 1, fewest=1)
    ru_max_asr_rise: float = within(0.1, 0, 1)
    ru_max_perplexity_ratio: float = within(1.5, 1)
    esu_min_asr_rise: float = within(0.4, 0, 1)
    esu_max_perplexity_ratio: float = within(1.5, 1)
    euu_min_perplexity_ratio: float = within(1.5, 1)


@dataclass
class EvaluateConfig:
    """Safety and utility measurements."""

    max_new_tokens: int = within(24, 1)
    batch_size: int = within(100, 1)
    system_prompt: str = MISSING
    harmbench: int | None = within(None, 1)  #: prompts, evenly spread; null: all of the set
    do_not_answer: int | None = within(None, 1)  #: the same of Do-Not-Answer
    utility: str = one_of("batched", "batched", "lm_eval")
    trivia_items: int = within(100, 1)
    arithmetic_items: int = within(50, 1)
    perplexity_rows: int = within(60, 1)
    gcg_behaviours: int = within(20, 1)  #: prompts, evenly spread; the search is long
    gcg_steps: int = within(100, 1)
    gcg_width: int = within(16, 1)  #: candidates in each step
    lm_eval_tasks: list[str] = field(default_factory=list)
    lm_eval_limit: int | None = within(None, 1)


@dataclass
class ProbesConfig:
    """Reasoning direction: where states are compared, and on how many queries of each set."""

    positions: list[int] = all_within([2, 4, 6, 8, 10], 1, fewest=1)  #: generated tokens
    opening_tokens: int = within(8, 1)  #: to which all openings are cut
    evaluation_queries: int = within(50, 2)  #: of the evaluation prompts
    queries: int = within(24, 2)  #: of every other set, and at words that all models read


@dataclass
class AdapterConfig:
    """One adapter: what peft makes of it, and how fast it learns."""

    peft: dict[str, Any] = field(default_factory=dict)  #: arguments of peft's configuration
    blocks: float = within(1.0, high=1, above=0)  #: the top ones of all, with a LLaMA-Adapter
    rates: list[float] = all_within([], 1e-8, 10, fewest=1)  #: the paper's, and others


@dataclass
class AdaptersConfig:
    """Adapters (Table 5), each trained for one epoch at each of its rates."""

    batch_size: int = within(16, 1)
    methods: dict[str, AdapterConfig] = field(default_factory=dict)  #: by the name in tables


@dataclass
class ExperimentConfig:
    """What is measured: arms by the names that tables show, shares, and numbers of random draws.

    Shares are fractions of all units. Names are checked before anything is computed
    (:func:`ssah.lab.catalogue.check`).
    """

    removed: list[str] = field(default_factory=list)  #: arms of Table 1
    removed_draws: int = within(1, 0)  #: random controls of the groups among them
    removed_asked: list[str] = field(default_factory=list)  #: other prompts for these groups
    stability: list[str] = field(default_factory=list)  #: comparisons of fig_stability
    sweep_shares: list[float] = all_within([], 0, 1)  #: to remove in fig_share_sweep
    sweep_draws: int = within(1, 0)
    frozen: dict[str, list[str]] = field(default_factory=dict)  #: attack -> groups or rules
    frozen_draws: int = within(1, 0)  #: random controls of ESU + 6 % CU, and of what is ruled
    #: attack -> other papers' rules at their sizes (Tables 7 to 10)
    ruled: dict[str, list[str]] = field(default_factory=dict)
    #: groups that say in the attacked model what they say in the aligned one (fig_sufficiency)
    patched: list[str] = field(default_factory=list)
    patched_draws: int = within(1, 0)  #: random controls of each of them
    adapters: dict[str, list[str]] = field(default_factory=dict)  #: attack -> arms of Table 5
    cu_percents: list[float] = all_within([], 0, 100)  #: frozen beside ESU in fig8
    frozen_asked: list[str] = field(default_factory=list)  #: other prompts for arms of Table 2
    conditions: list[str] = field(default_factory=list)  #: arms of fig_conditions beside Table 2's
    #: defence -> strengths of it, the recommended one first (table_defences)
    defences: dict[str, list[float]] = field(default_factory=dict)
    #: attacks under which they are measured: strengths are chosen in the main one, and the others
    #: test the choice
    defended_in: list[str] = field(default_factory=lambda: ["instructions", "arithmetic"])
    defended_longer: list[str] = field(default_factory=list)  #: of them, for fig_defences_steps
    ru_share: float = within(0.2, high=1, above=0)  #: what Table 4 calls RU
    aligned_through: list[str] = field(default_factory=list)  #: arms of Table 4
    ru_shares: list[float] = all_within([], 0, 1)  #: other shares of RU in Table 4
    aligned_asked: list[str] = field(default_factory=list)  #: other prompts for arms of Table 4
    instructed: list[str] = field(default_factory=list)  #: attacks of table_instructions
    jailbreaks: list[str] = field(default_factory=list)  #: of Tables 16 and 17
    jailbreak_prompts: str = "AdvBench"  #: what they are of; where there is no such set, AdvBench


@dataclass
class RuntimeConfig:
    """How to run; nothing but the precision and the kind of device, which are in the keys, changes
    what is computed."""

    device: str = "auto"
    #: Of matrix products; auto is bfloat16 where the hardware has it. Part of every key, since
    #: one verdict in sixteen changes (docs/reproduction.md).
    precision: str = one_of("float32", "float32", "bfloat16", "auto")
    threads: int | None = within(None, 1, 1024)
    #: Jobs side by side; null: what memory and cores allow.
    processes: int | None = within(None, 1, 1024)


@dataclass
class Config:
    """Everything. ``name`` is the profile's; seeds are ``seed`` ... ``seed + n_seeds - 1``."""

    name: str = MISSING
    seed: int = within(0, 0, 2**32 - 1)
    n_seeds: int = within(1, 1, 1000)
    #: Of Table 1 and the main attack of Table 2, where these are more than ``n_seeds``.
    headline_seeds: int = within(0, 0, 1000)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


ConfigStore.instance().store(name="schema", node=Config)

PROFILES = ("laptop", "smoke", "paper")
#: The parts of a configuration, by the name of their group of files.
_PARTS: dict[str, Any] = {
    f.name: f.default_factory for f in fields(Config) if is_dataclass(f.default_factory)
}
GROUPS = ("profile", *_PARTS)


@cache
def known_keys() -> list[str]:
    """Every key that an override may set: ``roles.esu_shares`` and so on, and the groups."""
    keys = ["seed", "n_seeds", "headline_seeds", *GROUPS]
    for group, part in _PARTS.items():
        for leaf in fields(part):
            key = f"{group}.{leaf.name}"
            keys += [key, *(f"{key}.{name}" for name in _names_in_files(group, leaf.name))]
    return keys


def _names_in_files(group: str, leaf: str) -> list[str]:
    """What any file of the group sets in a dictionary such as ``finetune.rows``."""
    names: dict[str, None] = {}
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        written = OmegaConf.load(file)
        own = OmegaConf.select(written, leaf if group not in written else f"{group}.{leaf}")
        names |= dict.fromkeys(own if isinstance(own, DictConfig) else ())
    return list(names)


def compose(profile: str = "laptop", overrides: Sequence[str] = ()) -> Config:
    """Compose and check a configuration.

    Raises :class:`SsahError` for an unknown profile or key (naming the nearest valid one), an
    unknown option of a group, or a value of the wrong type.
    """
    overrides = list(overrides)
    require_known(profile, PROFILES, "Unknown profile")
    check_keys(overrides)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", [f"profile={profile}", *overrides])
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SsahError(f"Cannot compose the configuration: {reason}") from error
    assert isinstance(config, Config)
    check(config)
    _check_together(config)
    return config


#: What may differ between runs whose measurements are merged: what is asked, of how many states,
#: and where.
_PER_RUN = ("experiment", "probes", "runtime", "seed", "n_seeds", "headline_seeds")


def joint(configs: Sequence[Config]) -> Config:
    """What merged measurements are drawn with: the first configuration, asking all that any asks.

    Raises :class:`SsahError` where they differ in what is measured, not only in what is asked.
    """
    first, asked = configs[0], [config.experiment for config in configs]
    # Which prompts jailbreaks are of means nothing where none is asked.
    prompts = {experiment.jailbreak_prompts for experiment in asked if experiment.jailbreaks}
    shares = {experiment.ru_share for experiment in asked}
    differing = [
        *(key for key in _measured(first) if len({str(_measured(c)[key]) for c in configs}) > 1),
        *(["experiment.ru_share"] if len(shares) > 1 else []),
        *(["experiment.jailbreak_prompts"] if len(prompts) > 1 else []),
    ]
    if differing:
        raise SsahError(
            f"Runs of {first.model.name} differ in {', '.join(differing)}: only runs that differ "
            "in seeds and in what is asked can be merged."
        )
    union = {f.name: _union([getattr(e, f.name) for e in asked]) for f in fields(first.experiment)}
    union["jailbreak_prompts"] = min(prompts, default=first.experiment.jailbreak_prompts)
    return replace(first, experiment=ExperimentConfig(**union))


def _measured(config: Config) -> dict[str, Any]:
    """Every setting by its key, but those of :data:`_PER_RUN`."""
    groups = {name: value for name, value in asdict(config).items() if name not in _PER_RUN}
    groups["profile"] = {"name": groups.pop("name")}
    return {f"{group}.{name}": v for group, values in groups.items() for name, v in values.items()}


def _union(values: Sequence[Any]) -> Any:
    """Each element of some lists once, by key where they have keys; of numbers the largest."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _union([value.get(key, []) for value in values]) for key in keys}
    if isinstance(values[0], list):
        return list(dict.fromkeys(element for value in values for element in value))
    return max(values)


def _check_together(config: Config) -> None:
    """Values that do not fit each other, or a folder's name."""
    if not re.fullmatch(r"[\w.-]+", config.model.name):
        raise InvalidValueError(
            f"model.name={config.model.name!r} is part of folder names: use letters, digits, '_', "
            "'.' and '-'."
        )
    for name, size, of, training in (
        ("align", config.align.batch_size, "align", config.align),
        ("finetune", config.finetune.batch_size, "finetune", config.finetune),
        ("adapters", config.adapters.batch_size, "finetune", config.finetune),
    ):
        part = training.micro_batch_size
        if size > part and size % part:
            raise InvalidValueError(
                f"{name}.batch_size={size} is no multiple of {of}.micro_batch_size={part}: "
                "change one of them."
            )
    roles = config.roles
    largest = max(roles.ru_shares) + max(roles.esu_shares) + max(roles.euu_shares)
    if largest > 1:
        raise InvalidValueError(
            "The largest of roles.ru_shares, roles.esu_shares and roles.euu_shares are "
            f"{largest:.0%} of all units together: make them smaller."
        )


def model_config(name: str) -> ModelConfig:
    """A model by the name of its file in ``conf/model``."""
    valid = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
    require_word("finetune.answers_of", name, valid)
    return compose("laptop", [f"model={name}"]).model


def split_profile(overrides: list[str]) -> tuple[str, list[str]]:
    """The last profile that is named, and the other overrides."""
    profiles = [o.split("=", 1)[1] for o in overrides if o.startswith("profile=")]
    others = [o for o in overrides if not o.startswith("profile=")]
    return (profiles[-1] if profiles else "laptop"), others


def check_keys(overrides: list[str]) -> None:
    """Raise :class:`SsahError` for an override that sets nothing, naming the nearest key."""
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            key, sign, value = override.partition("=")
            if not sign or not re.fullmatch(r"[+~]*[\w./@]+", key):
                raise SsahError(f"'{override}' is not of the form key=value.") from error
            raise SsahError(
                f"The value of {key} cannot be read: put it in quotes, and once more in others for "
                f"the shell, as in '{key}=\"{value}\"'."
            ) from error
        key = parsed.key_or_group
        # What a file of the user's holds is told below its name: data.files.harmful.prompt.
        named = ".".join(key.split(".")[:3])
        if not {key, named} & set(known_keys()) and not key.startswith(("hydra.", "hydra/")):
            raise SsahError(f"Unknown override '{key}'{suggestion(key, known_keys())}")
        chosen = None if parsed.is_sweep_override() else parsed.value()
        files = chosen if key in GROUPS and isinstance(chosen, list) else []
        if not all(isinstance(file, str) for file in files):
            raise SsahError(f"{key}={chosen} names no file of conf/{key}: name one of them.")


def with_absolute_paths(override: str) -> str:
    """The override with the path of a file or folder made absolute: what a notebook is given must
    not depend on the folder that the command was called in."""
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_sweep_override():
        return override
    key, value = parsed.get_key_element(), parsed.value()
    made = _made_absolute(key.lstrip("+"), value)
    return override if made == value else f"{key}={_quoted(made)}"


def _made_absolute(key: str, value: Any) -> Any:
    """A value with the paths in it made absolute, where its key is one that names files."""
    if isinstance(value, dict) and re.fullmatch(r"data\.files(\.\w+)?", key):
        return {name: _made_absolute(f"{key}.{name}", part) for name, part in value.items()}
    named = re.fullmatch(r"model\.source|data\.files\.\w+(\.path)?", key)
    if not named or not isinstance(value, str) or value in ("embedded", "tiny"):
        return value
    path = Path(value)
    return value if path.is_absolute() or not path.exists() else str(path.absolute())


def _quoted(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_quoted(part)}' for name, part in value.items())}}}"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return "null" if value is None else str(value).lower()


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """Every combination of Hydra's sweep values: ``seed=0,1`` gives two lists of overrides."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in parsed
    ]
    return [list(combination) for combination in itertools.product(*choices)]
