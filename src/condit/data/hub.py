"""Repositories by name: `owner/name[@revision][/path]` on the Hugging Face hub, `ms:owner/name...` on ModelScope.

huggingface_hub downloads into its own cache, and reads HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. Files whose hash is not
the repository's are removed. `weights/hub_files.py` says which files a loader reads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from condit.data.files import atomic_write
from condit.data.messages import text
from condit.data.progress import progress_bar

log = logging.getLogger(__name__)
_PART = r"[A-Za-z0-9][\w.-]*"
_REVISION = r"refs/[^/@]+/[^/@]+|[^/@]+"  # only those of the hub's own references have a slash
_NAME = re.compile(rf"(ms:)?({_PART}/{_PART})(?:@({_REVISION}))?(?:/([^/].*?))?/?")
WEIGHTS = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt", ".npz")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class HubName:
    """A repository, a revision of it (None: the newest), and a file or folder in it ("": all)."""

    repo: str
    revision: str | None = None
    path: str = ""
    modelscope: bool = False

    @classmethod
    def of(cls, source: object) -> HubName | None:
        """None for a `Path`, for a text of another form, and for what exists on disk or would be in a folder that
        does: that is never looked up."""
        match = _NAME.fullmatch(source) if isinstance(source, str) else None
        if match is None or Path(match[0]).exists() or (not match[4] and match[2].endswith(WEIGHTS)):
            return None
        return None if _is_local(match) else cls(match[2], match[3], match[4] or "", bool(match[1]))

    def __str__(self) -> str:
        revision, path = self.revision and f"@{self.revision}", self.path and f"/{self.path}"
        return f"{'ms:' if self.modelscope else ''}{self.repo}{revision or ''}{path}"


def _is_local(match: re.Match[str]) -> bool:
    """Whether a folder has the owner's name, and neither a revision nor ms: says that a hub is meant."""
    return not match[1] and not match[3] and Path(match[2]).parent.is_dir()


def why_local(source: object) -> str:
    """For messages: why a name that is nowhere on disk was not looked up; "" for other sources."""
    match = _NAME.fullmatch(source) if isinstance(source, str) else None
    if match is None or not _is_local(match):
        return ""
    repo, path = match[2], f"/{match[4]}" if match[4] else ""
    return text("not-looked-up", folder=repr(repo.split("/")[0]), name=repr(f"{repo}@main{path}"))


@dataclass(frozen=True)
class RemoteFile:
    """bytes: None where the repository does not say; sha256: of large files only."""

    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, which is the revision of its name (on ModelScope: the revision asked for), and its
    files by path. asked: the revision that was asked for; cached: without access to the hub, the folder of the files
    that are in the cache."""

    name: HubName
    files: Mapping[str, RemoteFile]
    asked: str = "main"
    cached: Path | None = None

    @property
    def where(self) -> str:
        """For messages."""
        cache = f" in the cache; the hub was not reached (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')})"
        return f"{replace(self.name, path='')}{cache if self.cached else ''}"

    def missing(self, path: str) -> FileNotFoundError:
        near = get_close_matches(path, self.files, 3, 0.3) or sorted(self.files)[:3]
        return FileNotFoundError(text("no-file", file=path, name=self.where, near=", ".join(near) or "-"))

    def fetch(self, paths: Sequence[str]) -> Path:
        """The folder of the repository's files on disk, with these downloaded. FileNotFoundError for a file that it
        does not have, ValueError for one whose hash differs, OSError if the download fails."""
        for path in paths:
            if path not in self.files:
                raise self.missing(path)
        if self.cached is not None:
            return self.cached
        if self.name.modelscope:
            return Path(_modelscope().snapshot_download(self.name.repo, self.name.revision, allow_patterns=list(paths)))
        with _in_our_words(self.name):
            return self._download(paths)

    def copy_header(self, path: str, target: Path) -> None:
        """Writes the header of a safetensors file to a file of its size without data. Its first bytes are downloaded.
        ValueError for another file, and on ModelScope."""
        if not path.endswith(".safetensors") or self.name.modelscope:
            raise ValueError(f"{path} of {self.where} has no header that can be read alone. Download it first.")
        if self.cached is not None:
            target.symlink_to(self.cached / path)
            return
        from huggingface_hub import HfApi

        with _in_our_words(self.name):
            api = HfApi(endpoint=_endpoint(), library_name="condit")
            found = api.parse_safetensors_file_metadata(self.name.repo, path, revision=self.name.revision)
        places = found.tensors.items()
        entries = {n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets} for n, t in places}
        head = json.dumps({"__metadata__": found.metadata, **entries}).encode()
        target.write_bytes(len(head).to_bytes(8, "little") + head)
        os.truncate(target, 8 + len(head) + max((t.data_offsets[1] for _, t in places), default=0))

    def _download(self, paths: Sequence[str]) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        repo, commit = self.name.repo, self.name.revision
        new = [p for p in paths if not isinstance(try_to_load_from_cache(repo, p, revision=commit), str)]
        total = sum(self.files[path].bytes or 0 for path in new)
        if new:
            log.info("downloading %s: %d files, %.1f MB", self.where, len(new), total / 1e6)
        folder = Path()
        with progress_bar(total, repo, unit="B") if new else nullcontext(lambda n: None) as advance:
            for path in paths:
                file = Path(
                    hf_hub_download(
                        repo,
                        path,
                        revision=commit,
                        endpoint=_endpoint(),
                        library_name="condit",
                        tqdm_class=_share_of(advance),  # type: ignore[arg-type]  # it has the methods that are used
                    )
                )
                if path in new:
                    self._check(path, file)
                folder = file.parents[path.count("/")]
        if self.asked != commit and new:  # so that the cache knows the branch or tag without the hub
            atomic_write(folder.parents[1] / "refs" / self.asked, lambda ref: ref.write_text(str(commit)))
        return folder

    def _check(self, path: str, file: Path) -> None:
        wanted = self.files[path].sha256
        if wanted is None:
            return
        with open(file, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != wanted:
            blob = file.resolve()  # the cache links to it
            file.unlink()
            blob.unlink(missing_ok=True)
            raise ValueError(text("damaged", file=path, name=self.where, found=found[:12], wanted=wanted[:12]))


def open_repository(name: HubName) -> Repository:
    """The repository at the commit that its revision is now; without access to the hub, at the cached one.
    FileNotFoundError if there is none, PermissionError for one that is gated, OSError if the hub is not reached."""
    if name.modelscope:
        listing = _modelscope().hub.api.HubApi().get_model_files(name.repo, revision=name.revision, recursive=True)
        return Repository(name, {row["Path"]: RemoteFile(row.get("Size")) for row in listing})
    from huggingface_hub import HfApi, errors, snapshot_download

    with _in_our_words(name, text("not-here", name=repr(str(name)))):
        try:
            api = HfApi(endpoint=_endpoint(), library_name="condit")
            info = api.model_info(name.repo, revision=name.revision, files_metadata=True)
        except (errors.OfflineModeIsEnabled, _http_error()) as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            try:
                folder = snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
            except errors.LocalEntryNotFoundError:
                raise error from None
            cached = Path(folder)
            files = {p.relative_to(cached).as_posix(): RemoteFile() for p in cached.rglob("*") if p.is_file()}
            return Repository(replace(name, revision=cached.name), files, cached=cached)
    listed = {s.rfilename: RemoteFile(s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or ()}
    return Repository(replace(name, revision=info.sha), listed, name.revision or "main")


def _endpoint() -> str | None:
    """Read at each call: notebooks set it after huggingface_hub was imported, which reads it once."""
    return os.environ.get("HF_ENDPOINT") or None


def _http_error() -> type[Exception]:
    """What all errors of the HTTP library are that huggingface_hub stands on: httpx, or its successor."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast("type[Exception]", HfHubHTTPError.__bases__[0])


def _modelscope():
    try:
        import modelscope
        import modelscope.hub.api
    except ImportError as error:
        raise ImportError("names with ms: need ModelScope's package: pip install modelscope") from error
    return modelscope


def _share_of(advance: Callable[[int], None]) -> type:
    """The bar of one file, as huggingface_hub makes it, moves the bar of all files."""

    class Share:
        def __init__(self, *_: object, initial: int = 0, **__: object):
            advance(initial)

        def __enter__(self) -> Share:
            return self

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def nothing(self, *_: object, **__: object) -> None: ...

        # hf_xet also counts the bytes that it receives, which are fewer than those of the file.
        __exit__ = close = update_transfer = set_postfix_str = set_transfer_postfix_str = nothing

    return Share


@contextmanager
def _in_our_words(name: HubName, nothing_here: str = "") -> Iterator[None]:
    """huggingface_hub's errors with what to do. nothing_here: comes first where the hub did not say what it has."""
    from huggingface_hub import errors, get_token

    # The first that fits counts: a class of huggingface_hub, ours, and its message.
    kinds: tuple[tuple[type[Exception], type[OSError], str], ...] = (
        (errors.GatedRepoError, PermissionError, "gated"),
        (errors.RevisionNotFoundError, FileNotFoundError, "no-revision"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "no-repository"),
        (errors.OfflineModeIsEnabled, FileNotFoundError, "offline"),
        (errors.HfHubHTTPError, OSError, "answered"),
        (_http_error(), ConnectionError, "not-reached"),
        (OSError, OSError, "broke-off"),
    )
    try:
        yield
    except (OSError, _http_error()) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _http_error()):
            raise  # of the disk
        ours, key = next((ours, key) for theirs, ours, key in kinds if isinstance(error, theirs))
        refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
        if key == "answered" and refused:
            ours, key = PermissionError, "no-write-access"
        values = {
            "repo": name.repo,
            "revision": repr(name.revision),
            "name": name if key == "broke-off" else repr(str(name)),
            "page": f"{_endpoint() or HUB}/{name.repo}",
            "token": text("wrong-token" if get_token() else "no-token"),
            "reason": (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."),
        }
        unknown = key in ("offline", "answered", "not-reached")
        raise ours((nothing_here if unknown else "") + text(key, **values)) from error


def push_folder(folder: Path, repo: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Uploads a folder's files as one commit, and returns its address. PermissionError without write access, OSError
    where the hub refuses otherwise or is not reached."""
    from huggingface_hub import HfApi

    with _in_our_words(HubName(repo)):
        api = HfApi(endpoint=_endpoint(), library_name="condit", token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
