"""The files of a repository of Hugging Face's Kernel Hub, and where they may be written.

Source: https://huggingface.co/docs/kernels/kernel-requirements, of version 0.17.
"""

import hashlib
import json
import re
import shutil
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

from kernels.bench.hub.card import card
from kernels.bench.hub.modules import PACKAGE, texts

NAME = "dyhead"
# By the Hub's convention 0 is what may still change. A version is a branch of the repository, `v0`.
VERSION = 0
LICENSE = "mit"
# Without a version of torch and a machine, as for all kernels that are Python alone. The value is the backend.
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}
_MARK = "# Written by `python -m kernels.bench.hub`, as is build/; both are replaced when it runs again.\n"
# Older versions of Hugging Face's package look into a folder of the kernel's name.
_OLDER = '''\
"""What the folder above exports, for versions of Hugging Face's package that look here."""

import importlib.util
import sys
from pathlib import Path

if "{identity}" not in sys.modules:
    spec = importlib.util.spec_from_file_location("{identity}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{identity}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["{identity}"])
__all__ = list(sys.modules["{identity}"].__all__)
globals().update({{name: getattr(sys.modules["{identity}"], name) for name in __all__}})
'''


def _digest(files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of every file in base64, as metadata have it."""
    return {path: b64encode(hashlib.sha256(files[path]).digest()).decode() for path in sorted(files)}


def _variant(backend: str) -> dict[str, bytes]:
    """The files of one variant, by their paths in its folder."""
    triton = backend != "cpu"
    tuned = {f"tuned/{path.name}": path.read_bytes() for path in (PACKAGE / "tuned").glob("*.json") if triton}

    def files_of(identity: str) -> dict[str, bytes]:
        sources = texts(identity, triton) | {f"{NAME}/__init__.py": _OLDER.format(identity=identity)}
        return {path: text.encode() for path, text in sources.items()} | tuned

    # Operators are registered once in a process, so what differs in anything has another name.
    content = hashlib.sha256(json.dumps(_digest(files_of(NAME))).encode()).hexdigest()
    identity = f"_{NAME}_{backend}_{content[:8]}"
    files = files_of(identity)
    metadata = {
        "name": NAME,
        "id": identity,
        "version": VERSION,
        "license": LICENSE,
        # Of a curated list, on which there is no Triton: it comes with torch.
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": _digest(files)},
    }
    return files | {"metadata.json": f"{json.dumps(metadata, indent=2)}\n".encode()}


def _build_toml(repository: str | None) -> str:
    backends = ", ".join(f'"{backend}"' for backend in VARIANTS.values())
    lines = [
        "[general]",
        f'name = "{NAME}"',
        f"version = {VERSION}",
        # The newest that kernels 0.17.2 reads.
        "edition = 5",
        f'license = "{LICENSE}"',
        f"backends = [{backends}]",
        *(["", "[general.hub]", f'repo-id = "{repository}"'] if repository else []),
        "",
        "[torch-noarch]",
        'pyext = ["json", "py"]',
    ]
    return _MARK + "\n".join(lines) + "\n"


def repository_files(owner: str | None = None) -> dict[str, bytes]:
    """All files of the repository, by their paths in it; the same bytes whenever the sources are the same.

    Args:
        owner: The user or organisation of the Hub to whose repository the card and build.toml refer, if it has one.

    Raises:
        ValueError: `owner` is no name that the Hub has, or the sources cannot be copied; the message says why.
    """
    if owner is not None and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?", owner):
        raise ValueError(f"no user or organisation of the Hub has the name {owner!r}")
    repository = f"{owner}/{NAME}" if owner else None
    files = {"build.toml": _build_toml(repository).encode()}
    for variant, backend in VARIANTS.items():
        files |= {f"build/{variant}/{path}": content for path, content in _variant(backend).items()}
    return files | {"README.md": card(NAME, VERSION, LICENSE, repository).encode()}


def write(out: Path, owner: str | None = None) -> list[Path]:
    """Write the repository into a new or empty folder, or over one that was written before.

    Args:
        out: The folder; what else lies in one that was written before, such as `.git`, stays.
        owner: As in `repository_files`.

    Returns:
        The files.

    Raises:
        FileExistsError: `out` is a file, or holds files and was not written by this program.
        ValueError: as in `repository_files`.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    mark = out / "build.toml"
    if out.is_dir() and any(out.iterdir()) and not (mark.is_file() and mark.read_text().startswith(_MARK)):
        raise FileExistsError(f"{out} holds files that this program did not write; name an empty folder or a new one")
    files = repository_files(owner)
    for variant in VARIANTS:
        if (out / "build" / variant).exists():
            shutil.rmtree(out / "build" / variant)
    # The first is the mark: what is interrupted can be written again.
    for path, content in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    return [out / path for path in files]
