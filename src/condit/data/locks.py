"""One process at a time in a folder. The system ends a lock together with its owner, so that none is left behind."""

import datetime
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
LOCK, OWNER = ".lock", ".owner"  # the owner is text for people; the lock alone decides


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder, which is made. ValueError, with the owner, while another process holds it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK), folder / OWNER
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


def has_files(folder: Path) -> bool:
    """Whether a folder holds more than a lock."""
    return folder.is_dir() and any(path.name not in (LOCK, OWNER) for path in folder.iterdir())
