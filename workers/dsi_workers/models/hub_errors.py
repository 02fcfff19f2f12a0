"""What an error of the model hub means, and the sentence that explains it to the user."""

from __future__ import annotations

import json

import httpx2
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from dsi_workers.models.files import first_line

_LOGIN = "log in (hf auth login) or set HF_TOKEN"


def is_refusal(error: Exception) -> bool:
    """True if the hub answered and refused the request. A copy from the cache must not hide that."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def is_temporary(error: Exception) -> bool:
    """True if another try may help: an error of the network or of a server, but not a full disk."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 416, 429) or status >= 500
    return isinstance(error, httpx2.RequestError) or (isinstance(error, OSError) and error.errno is None)


def explanation(error: Exception, reference: str, repository: str, revision: str) -> str | None:
    """The sentence that explains an error of huggingface_hub to the user. None for an unexpected error, which is a bug."""
    unknown = f"unknown model {reference!r}: it is not a directory, a .gguf file or package:NAME, and"
    match error:
        case json.JSONDecodeError() | httpx2.InvalidURL():
            return f"{constants.ENDPOINT} does not answer like a model hub ({first_line(error)}): check HF_ENDPOINT and proxies"
        case HFValidationError():
            return f"{unknown} it is not a valid name for the model hub ({first_line(error)})"
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{repository}"
            return f"the model {reference!r} is gated: accept its conditions at {page}, then {_LOGIN}"
        case RevisionNotFoundError():
            return f"the model {repository!r} has no revision {revision!r} on the model hub"
        case RepositoryNotFoundError():
            return f"{unknown} the model hub does not have it; if it is private, {_LOGIN}"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the model hub refused {reference!r} ({error.response.status_code}): {_LOGIN}"
        case HfHubHTTPError():
            return f"the model hub could not deliver {reference!r} (it answered {error.response.status_code}): try again later"
        case OfflineModeIsEnabled():
            return _not_cached(reference, "HF_HUB_OFFLINE forbids fetching it")
        case RevisionResolutionError() | httpx2.RequestError():
            if is_offline_mode():
                return _not_cached(reference, "HF_HUB_OFFLINE forbids fetching it")
            return _not_cached(reference, f"the model hub {constants.ENDPOINT} cannot be reached ({_cause(error)})")
        case OSError():
            return (
                f"fetching {reference!r} failed ({error.strerror or first_line(error)}): check the directory "
                f"{constants.HF_HUB_CACHE} and its disk"
            )
    return None


def _not_cached(reference: str, reason: str) -> str:
    return f"the model {reference!r} is missing or incomplete in {constants.HF_HUB_CACHE}, and {reason}"


def _cause(error: BaseException) -> str:
    return first_line(error.__cause__ or error)
