"""Atomic files: write a temporary file, fsync, rename. A crash or a full disk leaves the old file unchanged."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file size limit is hit"}


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
    elif path.is_dir() and error.errno in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
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
        temporary.unlink(missing_ok=True)
    return Path(path)


def hash_file(path: str | Path) -> str:
    """The first 16 hex digits of the file's sha256, enough to detect a change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone, for splits without a random state."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 2**32
