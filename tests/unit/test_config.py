"""Composition: everything in ``conf/`` is usable, and every mistake is refused in a sentence."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass

import pytest

from ssah.app.study import Study
from ssah.core.errors import SsahError, suggestion
from ssah.core.paths import conf_dir
from ssah.lab.config import GROUPS, PROFILES, Config, check_keys, compose, known_keys, sweep_points
from ssah.lab.defended import COMBINED
from ssah.training.defences import DEFENCES

FILES = sorted(conf_dir().rglob("*.yaml"))
OPTIONS = [
    (path.parent.name, path.stem) for path in FILES if path.parent.name not in ("conf", "profile")
]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_composes(profile):
    config = compose(profile)
    assert isinstance(config, Config)
    assert config.name == profile
    assert config.evaluate.system_prompt
    assert config.seed == 0


def test_profiles_are_what_they_say():
    smoke, paper = compose("smoke"), compose("paper")
    assert (smoke.model.source, smoke.data.source) == ("tiny", "toy")
    assert paper.model.source.startswith("meta-llama/")
    assert not paper.align.enabled
    assert compose("laptop").model.source == "embedded"
    assert compose().name == "laptop"


def test_each_file_is_an_option():
    assert {path.parent.name for path in FILES} - {"conf"} == set(GROUPS)
    assert [path.name for path in FILES if path.parent == conf_dir()] == ["config.yaml"]
    assert {p.stem for p in FILES if p.parent.name == "profile"} == set(PROFILES)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    needed = ["model.source=/some/folder"] if option == "local" else []
    config = compose("smoke", [f"{group}={option}", *needed])
    assert is_dataclass(getattr(config, group))


def test_overrides_reach_the_configuration():
    config = compose(
        "smoke", ["seed=3", "roles.esu_shares=[0.1,0.2]", "model.revision=null", "align=none"]
    )
    assert config.seed == 3
    assert config.roles.esu_shares == [0.1, 0.2]
    assert config.model.revision is None
    assert not config.align.enabled


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("sed=1", "seed"),
        ("attribution.token=all", "attribution.tokens"),
        ("roles.esu_share=[0.1]", "roles.esu_shares"),
        ("esu_shares=[0.1]", "roles.esu_shares"),
        ("modell=tiny", "model"),
        ("evaluate.max_new_token=3", "evaluate.max_new_tokens"),
        ("+attribution.token=all", "attribution.tokens"),
        ("finetune.row.dialogues=8", "finetune.rows.dialogues"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(override, nearest):
    with pytest.raises(SsahError) as refused:
        compose("smoke", [override])
    assert f"did you mean '{nearest}'?" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_profile_is_refused_with_the_nearest():
    with pytest.raises(SsahError, match=r"Unknown profile 'smok': did you mean 'smoke'\?"):
        compose("smok")


@pytest.mark.parametrize(("group", "option", "valid"), [("model", "smolm2", "smollm2")])
def test_an_unknown_option_is_refused_with_the_valid_ones(group, option, valid):
    with pytest.raises(SsahError) as refused:
        compose("smoke", [f"{group}={option}"])
    assert valid in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=abc", "seed"),
        ("align.epochs=many", "align.epochs"),
        ("evaluate.batch_size=1.5", "evaluate.batch_size"),
        ("roles.esu_shares=0.1", "roles.esu_shares"),
        ("roles.esu_shares=[a]", "roles.esu_shares"),
        ("attribution.drop_first=7.5", "attribution.drop_first"),
        ("finetune.rows.dialogues=many", "finetune.rows.dialogues"),
        ("finetune.rows=8", "finetune.rows"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, named):
    with pytest.raises(SsahError) as refused:
        compose("smoke", [override])
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_value_is_refused():
    with pytest.raises(SsahError, match=r"model\.source"):
        compose("smoke", ["model=local"])


@pytest.mark.parametrize("text", ["seed", "=1", "seed=[1", "a b=1"])
def test_what_is_no_override_is_refused(text):
    with pytest.raises(
        SsahError,
        match=r"not of the form key=value|Unknown override|cannot be read: put it in quotes",
    ):
        check_keys([text])


def test_known_keys_are_all_that_can_be_set():
    config = Config()
    attacks = ("instructions", "arithmetic", "dialogues")
    expected = {
        *GROUPS,
        *(f"{key}.{a}" for key in ("finetune.rows", "experiment.frozen") for a in attacks),
    }
    expected |= {f"experiment.defences.{name}" for name in (*DEFENCES, *COMBINED)}
    expected |= {
        f"data.files.{name}"
        for name in ("harmful", "benign", *attacks, "harmbench", "hexphi", "do_not_answer")
    }
    for top in fields(Config):
        node = getattr(config, top.name)
        if is_dataclass(node):
            expected |= {f"{top.name}.{leaf.name}" for leaf in fields(node)}
        elif top.name != "name":  # the profile's own name is not for overrides
            expected.add(top.name)
    assert set(known_keys()) == expected


@pytest.mark.parametrize("key", known_keys())
def test_each_known_key_passes_the_check(key):
    check_keys([f"{key}=1"])


def test_files_of_a_data_source_can_be_overridden():
    config = compose("paper", ["data.files.harmful.path=/a.csv", "data.files.harmful.gated=false"])
    assert config.data.files["harmful"]["path"] == "/a.csv"
    assert config.data.files["benign"]["prompt"] == "instruction"


def test_rows_of_an_attack_can_be_overridden():
    config = compose("smoke", ["finetune.rows.dialogues=8"])
    assert config.finetune.rows == {"dialogues": 8, "instructions": 16, "arithmetic": 16}
    assert compose("laptop", ["experiment.frozen.dialogues=[ESU]"]).experiment.frozen["dialogues"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "experiment.aligned_through=[RU,'LoRA, as RUs']",
            "experiment.aligned_through: there is no 'LoRA, as RUs': did you mean 'LoRA, as RU'",
        ),
        ("experiment.conditions=[all head]", "there is no 'all head': did you mean 'all heads'"),
        (
            "experiment.frozen_asked=[Harmbench]",
            "there is no 'Harmbench': did you mean 'HarmBench'",
        ),
        ("experiment.instructed=[arithmetics]", "did you mean 'arithmetic'"),
        ("experiment.frozen.instruction=[ESU]", "did you mean 'experiment.frozen.instructions'"),
        ("experiment.frozen.instructions=[ESU + 6 CU]", "'ESU + 6 CU' is no group of units"),
    ],
)
def test_an_arm_that_does_not_exist_is_refused_before_anything_is_computed(override, says):
    with pytest.raises(SsahError, match=re.escape(says)):
        Study("smoke", [override])


@pytest.mark.parametrize("experiment", ["default", "published", "paper", "smoke"])
def test_the_arms_of_every_experiment_exist(experiment):
    for others in ([], ["align=none"]):
        Study("smoke", [f"experiment={experiment}", *others])


def test_sweeps_are_every_combination():
    assert sweep_points(["seed=0,1", "align=smoke,none", "n_seeds=2"]) == [
        ["seed=0", "align=smoke", "n_seeds=2"],
        ["seed=0", "align=none", "n_seeds=2"],
        ["seed=1", "align=smoke", "n_seeds=2"],
        ["seed=1", "align=none", "n_seeds=2"],
    ]
    assert sweep_points(["roles.esu_shares=[0.1,0.2]"]) == [["roles.esu_shares=[0.1,0.2]"]]
    assert sweep_points(["seed=range(0,3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    assert sweep_points([]) == [[]]


def test_a_sweep_without_the_flag_is_refused():
    with pytest.raises(SsahError, match="Cannot compose"):
        compose("smoke", ["seed=0,1"])


def test_suggestions_name_the_nearest_or_all():
    assert suggestion("tabel1", ["table1", "fig"]) == ": did you mean 'table1'?"
    assert suggestion("zzz", ["table1", "fig"]) == ": choose from table1, fig."
