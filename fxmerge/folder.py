"""Folders that are there whole or not at all.

What is written goes to ``.NAME.XXXXXXXX.partial`` beside its place, reaches the disk, and is then renamed. A process
that is killed leaves at most that hidden folder, which the next one to write to the same place removes.

``manifest.json`` holds size and SHA-256 of the other files, so that a flipped bit or a lost end is seen before
anything is read. It tells damage, not malice: who can change a file can change its digest too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxmerge.errors import FormatError, told
from fxmerge.fingerprint import digest_of_file

try:
    import fcntl
except ImportError:  # Windows: leftovers stay, as nothing tells whether their owner lives
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"


@contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside ``place`` for what will be renamed to it; gone afterwards, whatever happens.

    Its owner holds a lock on it, which the system releases when the process ends, so leftovers can be told from the
    work of others.
    """
    name = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.partial")
    place.parent.mkdir(parents=True, exist_ok=True)
    for other in place.parent.iterdir() if fcntl else ():
        if name.fullmatch(other.name) and other.is_dir() and (lock := _locked(other)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    lock = _locked(partial) if fcntl else None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of ``folder``, or None where another process does."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def publish(partial: Path, place: Path) -> None:
    """Brings everything in ``partial`` to the disk, then renames it to ``place``, which is free or an empty folder."""
    for file in partial.iterdir():
        to_disk(file)
    to_disk(partial)
    if place.exists():
        place.rmdir()  # is empty
    partial.rename(place)
    to_disk(place.parent)


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    if path.is_dir() and os.name == "nt":  # cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path, names: Iterable[str]) -> None:
    """Writes the manifest of the named files of ``folder``."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of_file(folder / name)} for name in names}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FormatError: it is missing or no JSON.
    """
    if not file.is_file():
        raise FormatError(f"{file.parent} has no {file.name}; give a folder that fxmerge saved")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{file} is not JSON ({told(error)}); save the module again") from None


def sealed(folder: Path, required: Iterable[str]) -> list[str]:
    """The names of the files that the manifest speaks of, each found as it was written.

    Raises:
        FormatError: there is no such folder, a file is missing, shorter, longer or otherwise changed, or the manifest
            does not mention one of the ``required``.
    """
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(record, dict) for record in files.values()):
        raise FormatError(f"{folder / MANIFEST} is no manifest; save the module again")
    for name in required:
        if name not in files:
            raise FormatError(f"{folder} has no {name}; give a folder that fxmerge saved")
    for name, record in files.items():
        if Path(name).name != name or name.startswith("."):
            raise FormatError(f"{folder / MANIFEST} names {name[:80]!r}, which is no file of the folder")
        if not (folder / name).is_file():
            raise FormatError(f"{folder} has no {name}; give a folder that fxmerge saved")
        size = (folder / name).stat().st_size
        if size != record.get("bytes"):
            raise FormatError(f"{folder / name} holds {size} bytes instead of {record.get('bytes')}: it was damaged")
        if digest_of_file(folder / name) != record.get("sha256"):
            raise FormatError(f"{folder / name} is not as it was saved: its SHA-256 has changed; save the module again")
    return list(files)
