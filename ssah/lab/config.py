"""Configuration: typed dataclasses for each stage, composed by Hydra from ``conf/``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..core.errors import SsahError, suggestion
from ..core.paths import conf_dir
from ..data.settings import DataConfig
from ..training.settings import AlignConfig, TrainingConfig


@dataclass
class ModelConfig:
    """The model under study. ``source``: ``embedded``, ``tiny``, a folder, or a hub id."""

    name: str = MISSING
    source: str = MISSING
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    chat_template: str | None = None  #: ``chatml``, or null for the tokenizer's own


@dataclass
class FinetuneConfig(TrainingConfig):
    """Harmless fine-tuning of the aligned model, with some units frozen or none.

    The rate is constant after the warm-up, so that the model after one epoch of a longer run is
    the model of a run of one epoch. ``epochs`` is the length of the longest run.
    """

    epochs: int = 2
    rows: dict[str, int] = field(default_factory=dict)  #: attack -> rows to train on
    heldout_rows: int = 32  #: of the attack's set, never trained on
    max_response_tokens: int = 24


@dataclass
class AttributionConfig:
    """Statistics and score of eq. 1."""

    samples: int = 120
    max_response_tokens: int = 48
    tokens: str = "response"  #: or ``all``
    drop_first: bool = False  #: with ``tokens=all``: leave out the first position
    variance_over: str = "token"  #: or ``sample_mean``
    unit_kind: str = "head"  #: or ``channel``, ``kv_group``
    batch_size: int = 16


@dataclass
class RolesConfig:
    """Shares to try, and what the removal of a group must do to be accepted.

    One share in a list fixes it. ASR limits are differences to the whole model; perplexity
    limits are ratios to it. ``redundant_kinds`` are the kinds of units that may be RU.
    """

    redundant_kinds: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    ru_shares: list[float] = field(default_factory=lambda: [0.25, 0.2, 0.15, 0.1, 0.05])
    esu_shares: list[float] = field(default_factory=lambda: [0.03, 0.02, 0.013, 0.01, 0.005])
    euu_shares: list[float] = field(default_factory=lambda: [0.15, 0.1, 0.05])
    ru_max_asr_rise: float = 0.1
    ru_max_perplexity_ratio: float = 1.5
    esu_min_asr_rise: float = 0.4
    esu_max_perplexity_ratio: float = 1.5
    euu_min_perplexity_ratio: float = 1.5


@dataclass
class EvaluateConfig:
    """Safety and utility measurements."""

    max_new_tokens: int = 24
    batch_size: int = 100
    system_prompt: str = MISSING
    harmbench: int | None = None  #: prompts, evenly spread over the set; null: all of them
    do_not_answer: int | None = None  #: the same of Do-Not-Answer
    utility: str = "batched"  #: or ``lm_eval``
    trivia_items: int = 100
    arithmetic_items: int = 50
    perplexity_rows: int = 60
    lm_eval_tasks: list[str] = field(default_factory=list)
    lm_eval_limit: int | None = None


@dataclass
class ProbesConfig:
    """Reasoning direction: where states are compared, and on how many queries of each set."""

    positions: list[int] = field(default_factory=lambda: [2, 4, 6, 8, 10])  #: generated tokens
    opening_tokens: int = 8  #: to which all openings are cut
    evaluation_queries: int = 50  #: of the evaluation prompts
    queries: int = 24  #: of every other set, and at words that all models read


@dataclass
class ExperimentConfig:
    """What is measured: arms by the names that tables show, shares, and numbers of random draws.

    Shares are fractions of all units. Names are checked before anything is computed
    (:func:`ssah.lab.catalogue.check`).
    """

    removed: list[str] = field(default_factory=list)  #: arms of Table 1
    removed_draws: int = 1  #: random controls of the groups among them
    removed_asked: list[str] = field(default_factory=list)  #: other prompts for these groups
    sweep_shares: list[float] = field(default_factory=list)  #: to remove in fig_share_sweep
    sweep_draws: int = 1
    frozen: dict[str, list[str]] = field(default_factory=dict)  #: attack -> groups or rules
    frozen_draws: int = 1  #: random controls of ESU + 6 % CU
    cu_percents: list[float] = field(default_factory=list)  #: frozen beside ESU in fig8
    frozen_asked: list[str] = field(default_factory=list)  #: other prompts for arms of Table 2
    conditions: list[str] = field(default_factory=list)  #: arms of fig_conditions beside Table 2's
    ru_share: float = 0.2  #: what Table 4 calls RU
    aligned_through: list[str] = field(default_factory=list)  #: arms of Table 4
    ru_shares: list[float] = field(default_factory=list)  #: other shares of RU in Table 4
    aligned_asked: list[str] = field(default_factory=list)  #: other prompts for arms of Table 4
    instructed: list[str] = field(default_factory=list)  #: attacks whose rows Table 4 teaches


@dataclass
class RuntimeConfig:
    """How to run; nothing here changes what is computed beyond rounding."""

    device: str = "auto"
    threads: int | None = None
    processes: int | None = None  #: jobs side by side; null: what memory and cores allow


@dataclass
class Config:
    """Everything. ``name`` is the profile's; seeds are ``seed`` ... ``seed + n_seeds - 1``."""

    name: str = MISSING
    seed: int = 0
    n_seeds: int = 1
    headline_seeds: int = 0  #: of Table 1 and the main attack of Table 2, where more than n_seeds
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


ConfigStore.instance().store(name="schema", node=Config)

PROFILES = ("laptop", "smoke", "paper")
GROUPS = (
    "profile", "experiment", "model", "data", "align", "attribution", "roles", "finetune",
    "evaluate", "probes", "runtime",
)  # fmt: skip


@cache
def known_keys() -> list[str]:
    """Every key that an override may set: ``roles.esu_shares`` and so on, and the groups."""
    keys = ["seed", "n_seeds", "headline_seeds", *GROUPS]
    for top in fields(Config):
        node = Config.__dataclass_fields__[top.name].default_factory
        if is_dataclass(node):
            for leaf in fields(node):
                key = f"{top.name}.{leaf.name}"
                keys += [key, *(f"{key}.{name}" for name in _names_in_files(top.name, leaf.name))]
    return keys


def _names_in_files(group: str, leaf: str) -> list[str]:
    """What any file of the group sets in a dictionary such as ``finetune.rows``."""
    names: dict[str, None] = {}
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        written = OmegaConf.load(file)
        own = OmegaConf.select(written, leaf if group not in written else f"{group}.{leaf}")
        names |= dict.fromkeys(own if isinstance(own, DictConfig) else ())
    return list(names)


def compose(profile: str = "laptop", overrides: list[str] | None = None) -> Config:
    """Compose and check a configuration.

    Raises :class:`SsahError` for an unknown profile or key (naming the nearest valid one), an
    unknown option of a group, or a value of the wrong type.
    """
    overrides = list(overrides or [])
    if profile not in PROFILES:
        raise SsahError(f"Unknown profile '{profile}'{suggestion(profile, PROFILES)}")
    check_keys(overrides)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", [f"profile={profile}", *overrides])
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise SsahError(f"Cannot compose the configuration: {reason}") from error
    assert isinstance(config, Config)
    return config


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
            raise SsahError(f"'{override}' is not of the form key=value.") from error
        key = parsed.key_or_group
        # What a file of the user's holds is told below its name: data.files.harmful.prompt.
        named = ".".join(key.split(".")[:3])
        if not {key, named} & set(known_keys()) and not key.startswith(("hydra.", "hydra/")):
            raise SsahError(f"Unknown override '{key}'{suggestion(key, known_keys())}")


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
