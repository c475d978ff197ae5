"""Atomic files: write a temporary file, fsync, rename. A crash or a full disk leaves the old file unchanged."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a pipe without a writer would wait for one
_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file size limit is hit"}


def read_bounded(path: str | Path, limit: int) -> bytes:
    """The bytes of a file, one more than `limit` at most. Raises OSError, also for a pipe or a device, which could
    block or never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAITING)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device; expected a file")
        return file.read(limit + 1)


def parse_json(text: str | bytes) -> object:
    """json.loads, whose errors of all kinds become ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def temporary_path(path: Path, ending: str = "tmp") -> Path:
    """A new hidden path in the folder of `path`, on the same file system, so that the rename is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def fsync_path(path: Path) -> None:
    """fsync of a file or a folder; a folder that cannot be opened (Windows) is skipped."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(error: OSError, path: Path) -> OSError:
    """The same error with a text that names the target and the remedy."""
    reason = _FULL.get(error.errno or 0)
    if reason is not None:
        text = f"{reason} while writing {path}; its old content is unchanged. Free some space or write elsewhere"
    elif error.errno in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY) and path.is_dir():
        text = f"{path} is a folder; pass a file"
    else:
        text = f"cannot write {path}: {error.strerror or error}"
    return OSError(error.errno or errno.EIO, text)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> Path:
    """write(temporary path in the same folder), fsync, rename onto `path`; creates parent folders. Returns the path.
    Raises OSError with the reason; then `path` is unchanged and no temporary file is left."""
    target = Path(path).resolve()  # a link is followed, not replaced
    temporary = temporary_path(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        fsync_path(temporary)
        os.replace(temporary, target)
        fsync_path(target.parent)
    except OSError as error:
        raise write_error(error, target) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
    return Path(path)


def check_writable(path: str | Path) -> None:
    """Raises the OSError that writing this file will end in, before the hours of work that make its content. Creates
    parent folders."""
    target = Path(path).resolve()
    temporary = temporary_path(target)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise write_error(error, target) from error


def remove_temporaries(folder: Path) -> None:
    """Deletes what atomic writes into this folder left when their process was killed."""
    for path in list(folder.rglob(".*.????????.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def hash_file(path: str | Path) -> str:
    """The first 16 hex digits of the file's sha256, enough to detect a change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, for splits without a random state."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 2**32
