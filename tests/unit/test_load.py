"""Model folders: what is in them shapes the key, and damage is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssah.core.errors import SsahError
from ssah.core.store import Store
from ssah.lab import load as load_module
from ssah.lab.config import compose
from ssah.lab.lab import Lab
from ssah.lab.load import Checkpoint, shapes
from ssah.lab.specs import GIVEN
from ssah.units.families import FAMILIES
from ssah.units.layout import UnitLayout


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def lab_of(folder: Path, *overrides: str) -> Lab:
    config = compose(
        "smoke", ["model=local", f"model.source={folder}", "model.chat_template=chatml", *overrides]
    )
    return Lab(config, Store(folder.parent / "runs"), 0)


def load(lab: Lab) -> None:
    """Its shapes, its tokenizer and its weights."""
    _ = lab.layout, lab.tokenizer
    with lab.use(GIVEN):
        pass


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, new) -> None:
    path = folder / "model.safetensors"
    save_file({new(name): t for name, t in load_file(path).items()}, path, {"format": "pt"})


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit(f / "tokenizer_config.json", eos_token="<|endoftext|>"),
        lambda f: edit(f / "tokenizer.json", truncation=None, added=1),
        lambda f: edit(f / "generation_config.json", repetition_penalty=1.3),
        lambda f: edit(f / "config.json", rope_theta=5000.0),
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        lambda f: rename(f, lambda name: name.replace("0", "1") if "zzz" in name else name + ""),
    ],
    ids=["tokenizer settings", "tokenizer", "generation", "configuration", "template", "same"],
)
def test_whatever_shapes_what_a_model_says_is_in_its_key(folder, change, request):
    before = lab_of(folder).given.identity
    change(folder)
    same = request.node.callspec.id == "same"
    assert (lab_of(folder).given.identity == before) is same


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", ["head", "channel", "kv_group"])
def test_shapes_without_weights_make_the_same_layout(families, model_type, kind, tmp_path):
    """They are read off once; what is kept is enough."""
    model = families(model_type)
    model.save_pretrained(tmp_path / "model")
    store = Store(tmp_path / "runs")
    checkpoint = Checkpoint(str(tmp_path / "model"), "a hash")
    wanted = UnitLayout.of(model, kind)
    for _ in range(2):
        found = UnitLayout.of(shapes(store, checkpoint, model_type), kind)
        assert [b.name for b in found.blocks] == [b.name for b in wanted.blocks]
        for own, other in zip(found.blocks, wanted.blocks, strict=True):
            assert own.output == other.output
            assert torch.equal(own.channels, other.channels)
            assert [(s.parameter, s.dim, s.width, s.length) for s in own.slices] == [
                (s.parameter, s.dim, s.width, s.length) for s in other.slices
            ]
        shutil.rmtree(tmp_path / "model", ignore_errors=True)


def test_a_readme_is_not(folder):
    before = lab_of(folder).given.identity
    (folder / "README.md").write_text("about")
    assert lab_of(folder).given.identity == before


def test_a_template_that_prints_the_date_gives_one_prompt_on_every_day(folder):
    template = (
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    lab = lab_of(folder, "model.chat_template=null")
    said = lab.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "26 Jul 2024 Hi"


# --- terms -----------------------------------------------------------------------------------


def test_terms_are_accepted_before_anything_is_downloaded(tmp_path, monkeypatch):
    begun: list[str] = []

    def fetch(store: Store, name: str):
        begun.append(name)
        raise SsahError("no network")

    monkeypatch.setattr(load_module, "fetch", fetch)
    store = Store(tmp_path / "runs")
    gemma = compose("laptop", ["model=gemma3_270m"])
    with pytest.raises(SsahError, match=r"Gemma Terms of Use \(https://ai\.google\.dev") as no:
        _ = Lab(gemma, store, 0).given
    assert "model.accept_terms=true" in str(no.value)
    assert begun == []
    accepted = compose("laptop", ["model=gemma3_270m", "model.accept_terms=true"])
    with pytest.raises(SsahError, match="no network"):
        _ = Lab(accepted, store, 0).given
    assert begun == ["gemma3_270m"]


def test_what_is_only_said_of_a_model_is_in_no_key(smoke_lab):
    plain = smoke_lab()
    other = smoke_lab("model.accept_terms=true", "model.use=aligning", "model.family=qwen2")
    assert plain.settings == other.settings
    assert plain.settings == {"dtype": "float32", "attention": "sdpa", "template": "chatml"}
    assert plain.identity(plain.aligned) == other.identity(other.aligned)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_weights_under_other_names_are_refused_and_not_drawn_at_random(folder, prefix):
    rename(folder, lambda name: prefix + name)
    with pytest.raises(
        SsahError, match=r"do not fit its config\.json \(missing: .* and \d+ more; unexp"
    ):
        load(lab_of(folder))


def test_one_renamed_weight_is_refused_by_both_names(folder):
    rename(folder, lambda n: n.replace("layers.1.mlp.up_proj", "layers.1.mlp.upp_proj"))
    with pytest.raises(SsahError) as refused:
        load(lab_of(folder))
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(refused.value)
    assert "unexpected: model.layers.1.mlp.upp_proj.weight" in str(refused.value)


def test_weights_of_another_shape_are_refused(folder):
    edit(folder / "config.json", intermediate_size=48)
    with pytest.raises(SsahError, match=r"\(of another shape: model\.layers\.0\.mlp"):
        load(lab_of(folder))


def test_weights_beside_the_blocks_are_left_out_aloud(folder, caplog):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "v_head.weight": torch.ones(2)}, path, {"format": "pt"})
    with caplog.at_level("INFO", "ssah"):
        load(lab_of(folder))
    assert "weights that have no place are left out (unexpected: v_head.weight)" in caplog.text


def test_a_tied_head_is_not_missed(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    with lab_of(folder).use(GIVEN) as model:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: cut(f / "model.safetensors"), "cannot be loaded"),
        (lambda f: pointer(f / "model.safetensors"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "The configuration in"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "configuration"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json with *.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no config.json with *.safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "The tokenizer in"),
        (
            lambda f: [p.unlink() for p in f.glob("*token*")],
            "The tokenizer in",
        ),
    ],
    ids=["cut", "pointer", "json", "type", "no config", "no weights", "bad tokenizer", "none"],
)
def test_a_damaged_folder_is_one_sentence(folder, damage, says):
    damage(folder)
    with pytest.raises(SsahError) as refused:
        load(lab_of(folder))
    assert says in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_backend_that_is_not_installed_is_one_sentence(folder):
    with pytest.raises(SsahError, match=r"cannot be loaded: .*[Ff]lash"):
        load(lab_of(folder, "model.attn_implementation=flash_attention_2"))


def test_a_damaged_gguf_is_one_sentence(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(SsahError, match=r"model\.gguf cannot be loaded"):
        _ = lab_of(path).layout


def test_numbers_that_are_not_finite_are_refused_by_block(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    from ssah.lab.stages.roles import roles

    with pytest.raises(SsahError, match=r"layers\.1\.mlp has numbers that are not finite"):
        roles(lab_of(folder, "align=none"))
