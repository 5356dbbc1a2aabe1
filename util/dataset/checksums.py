"""Files held against their checksums once, and fingerprints of data: whether they are what they were."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError

SAMPLES = 16  # files of which a fingerprint holds the content


def cache_root() -> Path:
    """The directory of this project's in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rate_based_backpropagation"


def memory_root() -> Path:
    return cache_root() / "checked"


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_once(folder: Path, stated: Mapping[str, str]) -> None:
    """Raises UserError for a file in ``folder`` (a name of ``stated``) that has not the SHA-256 that is stated.

    Files that were found to have it, and since have kept their sizes and times, are remembered in the user's cache.
    """
    folder = folder.resolve()
    memory = memory_root() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    found = {name: _state(folder / name, digest) for name, digest in stated.items()}
    if found == _remembered(memory):
        return
    for name, digest in stated.items():
        if file_digest(folder / name) != digest:
            raise UserError(f"{folder / name} is not what was written (its checksum): remove {folder}, make it again")
    with suppress(OSError):  # checked again the next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = memory.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, memory)


def _state(path: Path, digest: str) -> list:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, digest]


def _remembered(memory: Path) -> Any:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def fingerprint(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(memoryview(part).nbytes).encode())
        digest.update(part)
    return digest.hexdigest()


def fingerprint_of_files(paths: Sequence[Path], names: Iterable[str]) -> str:
    """Of their ``names``, and of the content of a few of them: all might take hours to read."""
    some = paths[:: max(1, len(paths) // SAMPLES)]
    return fingerprint("\n".join(names).encode(errors="surrogateescape"), *(path.read_bytes() for path in some))
