"""One process at a time in a folder. The system ends a lock together with its owner, so that none is left behind."""

import datetime
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)
LOCK, OWNER = ".lock", ".owner"  # the owner is text for people; the lock alone decides


@contextmanager
def locked(folder: Path, doing: str, part: str = "") -> Iterator[None]:
    """Holds the lock of a folder, which is made, or of a part of the work in it. ValueError, with the owner, while
    another process holds it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / f"{LOCK}{part}"), folder / f"{OWNER}{part}"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise ValueError(f"{who} is {doing} in {folder}. Wait for it or stop it, or choose another folder.") from None
    except NotImplementedError:
        log.warning("%s is on a file system without locks; start no second process there.", folder)
    try:
        began = datetime.datetime.now().isoformat(" ", "seconds")
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {began},", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Waits for its turn among processes that read and write the small shared files of a folder."""
    from filelock import FileLock

    lock = FileLock(folder / f"{LOCK}-tables")
    with suppress(NotImplementedError):  # `locked` has warned of such a file system
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def has_files(folder: Path) -> bool:
    """Whether a folder holds more than a lock."""
    return folder.is_dir() and any(not path.name.startswith((LOCK, OWNER)) for path in folder.iterdir())
