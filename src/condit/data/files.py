"""Files that are whole or absent: write beside, fsync, rename. A crash or a full disk leaves what was there."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file size limit is hit"}


def beside(path: Path, ending: str = "tmp") -> Path:
    """A new hidden name in the folder of `path`: same file system, so the rename is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def fsync_path(path: Path) -> None:
    """Ask the disk to keep a file or a folder; a folder that cannot be opened (Windows) is left alone."""
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
    """The same error with a text that names the target and what to do."""
    reason = _FULL.get(error.errno or 0)
    if reason is not None:
        text = (
            f"{reason} while writing {path}; what stood there before is unchanged. Free some space or write elsewhere"
        )
    elif path.is_dir() and error.errno in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        text = f"{path} is a folder; name a file"
    else:
        text = f"cannot write {path}: {error.strerror or error}"
    return OSError(error.errno or errno.EIO, text)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> Path:
    """write(temporary path in the same folder), fsync, rename onto `path`; folders above are made.
    Raises OSError with a clear text; then `path` is as it was and no temporary file is left. Returns the path."""
    target = Path(path).resolve()  # a link is followed, not replaced
    temporary = beside(target)
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
    """The first 16 hex digits of the file's sha256: enough to tell whether a file is still the same."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def unit(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: the splits need no random state."""
    return int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 2**32
