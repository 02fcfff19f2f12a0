"""Models of the hub: what is missing is fetched into huggingface_hub's own cache, where other programs find it, too.

The library fetches a file under a new random name each time, so a fetch that is killed begins at zero and leaves its file
behind. Here a file grows under one name (`<etag>.dsi.incomplete`, beside the library's blobs) until its checksum is the hub's;
then it is put in place, and the library finds it there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    hf_raise_for_status,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, though
from huggingface_hub.utils import logging as hub_logging

from dsi_workers.models.files import (
    INDEX_FILE,
    SINGLE_FILE,
    ModelError,
    Report,
    check_model,
    first_line,
    only_one,
    weight_files,
    why_no_weights,
)

#: What is fetched beside the weights.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_AT_ONCE = 4  # files
#: Tries in a row that brought not one byte, and the pause after the first; each later pause is twice as long.
_TRIES, _PAUSE_S = 5, 1.0
#: For a connection, and for the next bytes.
_TIMEOUT_S = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
_LIBRARY = "dsi-actors"
#: An incomplete file of others that nobody has written to for so long belongs to a process that was killed.
_ABANDONED_S = 3600.0
_REPORT_EVERY_S = 0.2
_LOGIN = "log in (hf auth login) or set HF_TOKEN"


def fetch(reference: str, *, tokenizer_only: bool, report: Report) -> Path:
    """The directory of the model `org/name` or `org/name@revision`. Raises ModelError.

    Without a connection, or with HF_HUB_OFFLINE, what is in the cache is used if it is complete."""
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    repository, _, revision = reference.partition("@")
    try:
        storage = _storage(repository)
        try:
            return _Fetch(reference, repository, revision, storage, tokenizer_only, report).directory()
        except (httpx2.RequestError, HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError) as error:
            if _is_refusal(error):
                raise
            cached = _cached(repository, revision, storage, tokenizer_only)
            if cached is None:
                raise
            return cached
    except ModelError:
        raise
    except Exception as error:
        if (problem := _problem(error, reference, repository, revision)) is None:
            raise
        raise ModelError(problem) from None


class _Fetch:
    """One model, from what the hub says of it to its directory in the cache."""

    def __init__(
        self, reference: str, repository: str, revision: str, storage: Path, tokenizer_only: bool, report: Report
    ) -> None:
        self._reference, self._repository = reference, repository
        self._storage, self._tokenizer_only, self._report = storage, tokenizer_only, report
        report(f"asking the hub for {reference}", None, "")
        api = HfApi(library_name=_LIBRARY)
        self._commit = api.resolve_revision(repository, revision=revision or None).resolved
        listed = api.model_info(repository, revision=self._commit, files_metadata=True).siblings or []
        self._files = {file.rfilename: file for file in listed if "/" not in file.rfilename}

    def directory(self) -> Path:
        if not self._tokenizer_only and INDEX_FILE not in self._files and SINGLE_FILE not in self._files:
            raise why_no_weights(self._reference, list(self._files))
        small = [name for name in self._files if any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL_FILES)]
        self._get(small, f"fetching tokenizer and configuration of {self._reference}")
        directory = self._storage / "snapshots" / self._commit
        if not self._tokenizer_only:
            names = weight_files(directory) if INDEX_FILE in self._files else [SINGLE_FILE]
            if absent := [name for name in names if name not in self._files]:
                raise ModelError(
                    f"the model hub lacks {absent[0]} of {self._reference}: choose another model or revision"
                )
            self._get(names, f"fetching {self._reference}")
        return directory

    def _get(self, names: Iterable[str], what: str) -> None:
        missing = [self._files[name] for name in names if not self._is_cached(self._files[name])]
        if not missing:
            return
        lock = self._storage.parent / ".locks" / self._storage.name / "dsi.lock"
        with only_one(lock, f"fetching {self._reference}", self._report):
            missing = [file for file in missing if not self._is_cached(file)]
            blobs = self._storage / "blobs"
            blobs.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(blobs, keep={_etag(file) for file in self._files.values()})
            downloads = [_Download(file, self._repository, self._commit, blobs) for file in missing]
            self._check_room(downloads)
            progress = _Progress(what, downloads, self._report)
            pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
            try:
                ended, _ = wait([pool.submit(download.run, progress) for download in downloads], None, FIRST_EXCEPTION)
                for download_ended in ended:
                    download_ended.result()
            finally:
                progress.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
            for file in missing:  # the library finds the contents, and gives them their names
                hf_hub_download(self._repository, file.rfilename, revision=self._commit)

    def _is_cached(self, file: RepoSibling) -> bool:
        path = try_to_load_from_cache(self._repository, file.rfilename, revision=self._commit)
        if not isinstance(path, str) or not Path(path).exists():
            return False
        if Path(path).stat().st_size == _size(file):
            return True
        Path(path).resolve().unlink(missing_ok=True)  # cut short by a full disk, or by whoever copied the cache
        Path(path).unlink(missing_ok=True)
        return False

    def _check_room(self, downloads: list[_Download]) -> None:
        needed = sum(download.size - download.have for download in downloads)
        free = shutil.disk_usage(self._storage).free
        if needed > free:
            raise ModelError(
                f"fetching {self._reference} takes {needed / 1e9:.1f} GB in {self._storage.parent}, where {free / 1e9:.1f} GB "
                "are free: make room, or set HF_HOME to a directory on another disk"
            )


class _Stopped(Exception):
    """Another file could not be fetched."""


class _Download:
    """One file of a model, and how much of it is here."""

    def __init__(self, file: RepoSibling, repository: str, commit: str, blobs: Path) -> None:
        self.name, self.size = file.rfilename, _size(file)
        self._checksum = _etag(file)
        self._git = file.lfs is None
        self._url = hf_hub_url(repository, file.rfilename, revision=commit)
        self._part = blobs / f"{self._checksum}.dsi.incomplete"
        self._blob = blobs / self._checksum

    @property
    def have(self) -> int:
        """Bytes that need not be fetched any more."""
        for path in (self._blob, self._part):
            if path.exists():
                return path.stat().st_size
        return 0

    def run(self, progress: _Progress) -> None:
        """Fetch what is missing, from where an earlier try ended. Raises ModelError, and what cannot be mended by trying."""
        failures, damaged = 0, False
        while not self._blob.exists():
            have = self.have
            if have > self.size:
                self._part.unlink()
                have = 0
            try:
                self._go_on(have, progress)
            except (httpx2.RequestError, OSError) as error:
                if not _may_pass(error):
                    raise
                failures = 0 if self.have > have else failures + 1
                if failures == _TRIES:
                    raise ModelError(
                        f"fetching {self.name} broke off again and again ({first_line(error)}): "
                        f"try later, it goes on behind the {_megabytes(self.have)} MB that are here"
                    ) from None
                time.sleep(_PAUSE_S * 2**failures)
                continue
            if self._checksum_of_part() == self._checksum:
                self._part.replace(self._blob)
                return
            self._part.unlink()
            if damaged:
                raise ModelError(
                    f"{self.name} arrived damaged twice: its checksum is not the one that the model hub names"
                )
            damaged = True

    def _go_on(self, have: int, progress: _Progress) -> None:
        """Not by the library's own loop: it keeps up to 10 MB in memory, which are lost when the connection breaks."""
        headers = {**build_hf_headers(library_name=_LIBRARY), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        progress.at(self, have)
        if have == self.size:
            return
        with get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT_S) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # a server that sends the whole file whatever is asked
                have = 0
            with self._part.open("ab" if have else "wb") as part:
                for piece in response.iter_bytes():
                    part.write(piece)
                    have += len(piece)
                    progress.at(self, have)
        if have < self.size:
            raise OSError(f"{self.name} ended after {have} of {self.size} bytes")

    def _checksum_of_part(self) -> str:
        """SHA-256 of a large file; of others, git's SHA-1."""
        with self._part.open("rb") as part:
            if not self._git:
                return hashlib.file_digest(part, "sha256").hexdigest()
            digest = hashlib.sha1(f"blob {self.size}\0".encode())
            while chunk := part.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()


class _Progress:
    """Adds up the bytes of all files. Several threads tell it."""

    def __init__(self, what: str, downloads: Iterable[_Download], report: Report) -> None:
        self._what, self._report = what, report
        self._here = {download: download.have for download in downloads}
        self._total = sum(download.size for download in downloads)
        self._lock = threading.Lock()
        self._reported_s = 0.0
        self.stopped = False

    def at(self, download: _Download, size: int) -> None:
        """So many bytes of this file are here. Raises _Stopped if nobody wants them any more."""
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._here[download] = size
            here, now_s = sum(self._here.values()), time.monotonic()
            if now_s - self._reported_s >= _REPORT_EVERY_S or here == self._total:
                self._reported_s = now_s
                part = here / self._total if self._total else 1.0
                self._report(self._what, part, f"{_megabytes(here)} of {_megabytes(self._total)} MB")


def _cached(repository: str, revision: str, storage: Path, tokenizer_only: bool) -> Path | None:
    """What is in the cache, if it is complete."""
    try:
        commit = HfApi().resolve_revision(repository, revision=revision or None, local_files_only=True).resolved
        directory = storage / "snapshots" / commit
        check_model(directory, tokenizer_only=tokenizer_only)
    except (RevisionResolutionError, ModelError):
        return None
    return directory


def _storage(repository: str) -> Path:
    """Where the library keeps this model."""
    try:
        cache = Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError:
        raise ModelError("this user has no home directory to keep models in: set HF_HOME to a directory") from None
    return cache.resolve() / repo_folder_name(repo_id=repository, repo_type="model")


def _remove_abandoned(blobs: Path, keep: set[str]) -> None:
    """What killed processes left: parts of files of earlier revisions, and those that the library cannot go on with."""
    now_s = time.time()
    for part in blobs.glob("*.incomplete"):
        ours = part.name.removesuffix(".dsi.incomplete")
        if ours not in keep and now_s - part.stat().st_mtime > _ABANDONED_S:
            part.unlink(missing_ok=True)


def _etag(file: RepoSibling) -> str:
    """Its name among the library's blobs, and its checksum."""
    checksum = file.lfs.sha256 if file.lfs is not None else file.blob_id
    if not checksum:
        raise ModelError(f"the model hub names no checksum of {file.rfilename}: check HF_ENDPOINT")
    return checksum


def _size(file: RepoSibling) -> int:
    return (file.lfs.size if file.lfs is not None else file.size) or 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size < 10_000_000 else f"{size / 1e6:,.0f}"


# What went wrong


def _is_refusal(error: Exception) -> bool:
    """Whether the hub is there, and said no: to go on with an old copy would hide it."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def _may_pass(error: Exception) -> bool:
    """Whether it is worth another try: the network's fault, or a server's. A full disk is not."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 416, 429) or status >= 500
    return isinstance(error, httpx2.RequestError) or (isinstance(error, OSError) and error.errno is None)


def _problem(error: Exception, reference: str, repository: str, revision: str) -> str | None:
    """The sentence for what the library raised. None: it is a bug."""
    unknown = f"unknown model {reference!r}: it is no directory, no .gguf file, no package:NAME, and"
    match error:
        case json.JSONDecodeError() | httpx2.InvalidURL():
            return f"what answers at {constants.ENDPOINT} is no model hub ({first_line(error)}): check HF_ENDPOINT and proxies"
        case HFValidationError():
            return f"{unknown} no name that the model hub allows ({first_line(error)})"
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{repository}"
            return f"the model {reference!r} is gated: accept its conditions at {page}, then {_LOGIN}"
        case RevisionNotFoundError():
            return f"the model {repository!r} has no revision {revision!r} on the model hub"
        case RepositoryNotFoundError():
            return f"{unknown} the model hub does not show it; if it is private, {_LOGIN}"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the model hub refused {reference!r} ({error.response.status_code}): {_LOGIN}"
        case HfHubHTTPError():
            return (
                f"the model hub did not give {reference!r} (it answered {error.response.status_code}): try again later"
            )
        case OfflineModeIsEnabled():
            return _not_cached(reference, "HF_HUB_OFFLINE forbids to fetch it")
        case RevisionResolutionError() | httpx2.RequestError():
            if is_offline_mode():
                return _not_cached(reference, "HF_HUB_OFFLINE forbids to fetch it")
            return _not_cached(reference, f"the model hub {constants.ENDPOINT} cannot be reached ({_cause(error)})")
        case OSError():
            return f"fetching {reference!r} failed ({error.strerror or first_line(error)}), in {constants.HF_HUB_CACHE}"
    return None


def _not_cached(reference: str, reason: str) -> str:
    return f"the model {reference!r} is not here (not in {constants.HF_HUB_CACHE}, or not all of it), and {reason}"


def _cause(error: BaseException) -> str:
    return first_line(error.__cause__ or error)
