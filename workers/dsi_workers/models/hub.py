"""Fetches models from the model hub into huggingface_hub's own cache, where other programs find them as well.

huggingface_hub gives an incomplete file a new random name in each fetch. So after a kill, its fetch starts at zero and leaves
the old file behind. Here, an incomplete file always has the same name (`<etag>.dsi.incomplete`, beside the blobs of
huggingface_hub), and the next fetch continues it. Once its checksum is the hub's, the file is renamed to a blob.
"""

from __future__ import annotations

import fnmatch
import hashlib
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
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not exported
from huggingface_hub.utils import logging as hub_logging

from dsi_workers.models.check import check_model
from dsi_workers.models.files import (
    INDEX_FILE,
    PICKLE_INDEX_FILE,
    SINGLE_FILE,
    SINGLE_PICKLE_FILE,
    ModelError,
    Report,
    exclusive_lock,
    first_line,
    missing_weights_error,
    pickle_files,
    weight_files,
)
from dsi_workers.models.hub_errors import explanation, is_refusal, is_temporary

#: Files that are fetched besides the weights.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
#: One of these says where the weights are.
_WEIGHTS = {INDEX_FILE, SINGLE_FILE, PICKLE_INDEX_FILE, SINGLE_PICKLE_FILE}
#: Files fetched at the same time.
_AT_ONCE = 4
#: A fetch gives up after this many tries in a row without a new byte. The first pause between tries; each later one is twice as
#: long.
_TRIES, _PAUSE_S = 5, 1.0
#: The longest wait for a connection, and for the next bytes.
_TIMEOUT_S = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
_LIBRARY = "dsi-actors"
#: An incomplete file that was not written to for this long belongs to a process that was killed.
_ABANDONED_S = 3600.0
_REPORT_EVERY_S = 0.2


def fetch(reference: str, *, tokenizer_only: bool, report: Report) -> Path:
    """Return the directory of the model `org/name` or `org/name@revision`. Fetches files that are missing. Raises ModelError.

    If the hub cannot be reached, or HF_HUB_OFFLINE is set, the model is taken from the cache if it is complete there.
    """
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    repository, _, revision = reference.partition("@")
    try:
        storage = _storage(repository)
        try:
            return _Fetch(reference, repository, revision, storage, tokenizer_only, report).directory()
        except (httpx2.RequestError, HfHubHTTPError, OfflineModeIsEnabled, RevisionResolutionError) as error:
            if is_refusal(error):
                raise
            cached = _cached(repository, revision, storage, tokenizer_only)
            if cached is None:
                raise
            return cached
    except ModelError:
        raise
    except Exception as error:
        if (problem := explanation(error, reference, repository, revision)) is None:
            raise
        raise ModelError(problem) from None


class _Fetch:
    """Fetches one model: asks the hub for its list of files, then fetches those that are missing in the cache."""

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
        """Fetch the files and return the model's directory."""
        if not self._tokenizer_only and not self._files.keys() & _WEIGHTS:
            raise missing_weights_error(self._reference, list(self._files))
        small = [name for name in self._files if any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL_FILES)]
        self._get(small, f"fetching tokenizer and configuration of {self._reference}")
        directory = self._storage / "snapshots" / self._commit
        if not self._tokenizer_only:
            names = self._weights(directory)
            if absent := [name for name in names if name not in self._files]:
                raise ModelError(
                    f"the model hub lacks {absent[0]} of {self._reference}: choose another model or revision"
                )
            self._get(names, f"fetching {self._reference}")
        return directory

    def _weights(self, directory: Path) -> list[str]:
        """The names of the files of weights: PyTorch's only if there are no safetensors. The index, if there is one, has been
        fetched."""
        if INDEX_FILE in self._files:
            return weight_files(directory)
        if SINGLE_FILE in self._files:
            return [SINGLE_FILE]
        return pickle_files(directory) if PICKLE_INDEX_FILE in self._files else [SINGLE_PICKLE_FILE]

    def _get(self, names: Iterable[str], what: str) -> None:
        """Fetch the files of these names that are not in the cache, and report progress as `what`."""
        missing = [self._files[name] for name in names if not self._is_cached(self._files[name])]
        if not missing:
            return
        lock = self._storage.parent / ".locks" / self._storage.name / "dsi.lock"
        with exclusive_lock(lock, f"fetching {self._reference}", self._report):
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
            for file in missing:  # huggingface_hub finds the blobs, and links the file names to them
                hf_hub_download(self._repository, file.rfilename, revision=self._commit)

    def _is_cached(self, file: RepoSibling) -> bool:
        """True if the file is in the cache with the right size. Deletes a cached file of another size."""
        path = try_to_load_from_cache(self._repository, file.rfilename, revision=self._commit)
        if not isinstance(path, str) or not Path(path).exists():
            return False
        if Path(path).stat().st_size == _size(file):
            return True
        # Truncated, for example by a full disk or while the cache was copied.
        Path(path).resolve().unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)
        return False

    def _check_room(self, downloads: list[_Download]) -> None:
        """Raise ModelError if the disk has too little free space."""
        needed = sum(download.size - download.have for download in downloads)
        free = shutil.disk_usage(self._storage).free
        if needed > free:
            raise ModelError(
                f"fetching {self._reference} needs {needed / 1e9:.1f} GB in {self._storage.parent}, where {free / 1e9:.1f} GB "
                "are free: make room, or set HF_HOME to a directory on another disk"
            )


class _Stopped(Exception):
    """The fetch of this file was stopped, because another file of the model could not be fetched."""


class _Download:
    """The fetch of one file of a model."""

    def __init__(self, file: RepoSibling, repository: str, commit: str, blobs: Path) -> None:
        self.name, self.size = file.rfilename, _size(file)
        self._checksum = _etag(file)
        self._git = file.lfs is None
        self._url = hf_hub_url(repository, file.rfilename, revision=commit)
        self._part = blobs / f"{self._checksum}.dsi.incomplete"
        self._blob = blobs / self._checksum

    @property
    def have(self) -> int:
        """Bytes of the file that are already on this machine."""
        for path in (self._blob, self._part):
            if path.exists():
                return path.stat().st_size
        return 0

    def run(self, progress: _Progress) -> None:
        """Fetch the missing bytes, starting where an earlier try ended.

        Raises ModelError after too many tries, or if the file arrives damaged twice. Errors for which another try is no use
        are raised as they are.
        """
        failures, damaged = 0, False
        while not self._blob.exists():
            have = self.have
            if have > self.size:
                self._part.unlink()
                have = 0
            try:
                self._resume(have, progress)
            except (httpx2.RequestError, OSError) as error:
                if not is_temporary(error):
                    raise
                failures = 0 if self.have > have else failures + 1
                if failures == _TRIES:
                    raise ModelError(
                        f"fetching {self.name} was interrupted again and again ({first_line(error)}): "
                        f"try later, the fetch will continue after the {_megabytes(self.have)} MB that are already here"
                    ) from None
                time.sleep(_PAUSE_S * 2**failures)
                continue
            if self._checksum_of_part() == self._checksum:
                self._part.replace(self._blob)
                return
            self._part.unlink()
            if damaged:
                raise ModelError(
                    f"{self.name} arrived damaged twice (its checksum is not the one that the model hub names): try later"
                )
            damaged = True

    def _resume(self, have: int, progress: _Progress) -> None:
        """Append the bytes after the first `have` to the incomplete file.

        huggingface_hub's own loop is not used: it buffers up to 10 MB, which are lost when the connection breaks.
        """
        headers = {**build_hf_headers(library_name=_LIBRARY), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        progress.at(self, have)
        if have == self.size:
            return
        with get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT_S) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # this server ignores ranges and sends the whole file
                have = 0
            with self._part.open("ab" if have else "wb") as part:
                for piece in response.iter_bytes():
                    part.write(piece)
                    have += len(piece)
                    progress.at(self, have)
        if have < self.size:
            raise OSError(f"{self.name} ended after {have} of {self.size} bytes")

    def _checksum_of_part(self) -> str:
        """The checksum of the incomplete file, of the kind that the hub uses: SHA-256 for large files, else git's SHA-1."""
        with self._part.open("rb") as part:
            if not self._git:
                return hashlib.file_digest(part, "sha256").hexdigest()
            digest = hashlib.sha1(f"blob {self.size}\0".encode())
            while chunk := part.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()


class _Progress:
    """Reports the progress of all files together. Called from several threads."""

    def __init__(self, what: str, downloads: Iterable[_Download], report: Report) -> None:
        self._what, self._report = what, report
        self._here = {download: download.have for download in downloads}
        self._total = sum(download.size for download in downloads)
        self._lock = threading.Lock()
        self._reported_s = 0.0
        self.stopped = False

    def at(self, download: _Download, size: int) -> None:
        """Note that `size` bytes of this file are on this machine. Raises _Stopped if the fetch was stopped."""
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
    """The directory of the model in the cache; None if it is incomplete or missing."""
    try:
        commit = HfApi().resolve_revision(repository, revision=revision or None, local_files_only=True).resolved
        directory = storage / "snapshots" / commit
        check_model(directory, tokenizer_only=tokenizer_only)
    except (RevisionResolutionError, ModelError):
        return None
    return directory


def _storage(repository: str) -> Path:
    """The directory in which huggingface_hub keeps this model."""
    try:
        cache = Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError:
        raise ModelError("this user has no home directory to keep models in: set HF_HOME to a directory") from None
    return cache.resolve() / repo_folder_name(repo_id=repository, repo_type="model")


def _remove_abandoned(blobs: Path, keep: set[str]) -> None:
    """Remove incomplete files that killed processes left: of earlier revisions, and those of huggingface_hub.

    `keep`: checksums of the files of this revision, whose incomplete files can be continued.
    """
    now_s = time.time()
    for part in blobs.glob("*.incomplete"):
        ours = part.name.removesuffix(".dsi.incomplete")
        if ours not in keep and now_s - part.stat().st_mtime > _ABANDONED_S:
            part.unlink(missing_ok=True)


def _etag(file: RepoSibling) -> str:
    """The checksum of the file, which is also the name of its blob in huggingface_hub's cache."""
    checksum = file.lfs.sha256 if file.lfs is not None else file.blob_id
    if not checksum:
        raise ModelError(f"the model hub gives no checksum for {file.rfilename}: check HF_ENDPOINT")
    return checksum


def _size(file: RepoSibling) -> int:
    return (file.lfs.size if file.lfs is not None else file.size) or 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size < 10_000_000 else f"{size / 1e6:,.0f}"
