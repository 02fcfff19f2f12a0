"""Which requests a worker refuses because of what they ask, in the order in which SPEC.md section 5 lists the reasons."""

from __future__ import annotations

from dsi_protocol import Draft, Request, Score, Verify
from dsi_workers.engine import EngineInfo
from dsi_workers.session import Session
from dsi_workers.tree import read_tree


def refusal(request: Request, session: Session, role: str, info: EngineInfo) -> tuple[str, str] | None:
    """The code and message of the Failed that answers `request`; None if this worker can serve it.

    What the worker holds does not matter here, and a refused request changes nothing of it.
    """
    if isinstance(request, Draft) == (role == "target"):
        return "request", f"this worker is a {role}: it does not answer {type(request).__name__}"
    if isinstance(request, Score):
        if not info.scores:
            return "request", "the engine of this worker does not tell the log probabilities of a given text"
        if not session.sampling.logprobs:
            return "request", "the generation was opened without logprobs"
        problem = _score_out_of_range(request, info)
    elif isinstance(request, Verify):
        problem = _verify_out_of_range(request, info)
    else:
        problem = _draft_out_of_range(request, info)
    if problem is not None:
        return "limit", problem
    return ("request", session.sampling.problem) if session.sampling.problem else None


def _verify_out_of_range(request: Verify, info: EngineInfo) -> str | None:
    try:
        main, branches = read_tree(request.base, request.tokens, request.parents)
    except ValueError as error:
        return str(error)
    end = request.base + len(main)
    if (problem := _out_of_range(request, max([end, *(branch.end for branch in branches)]), info)) is not None:
        return problem
    if not 1 <= request.start <= end:
        return f"start {request.start} lies outside [1, {end}]"
    if branches and len(request.tokens) > info.rows:
        return f"a tree of {len(request.tokens)} positions is over this worker's limit of {info.rows}"
    if any(branch.fork < request.start for branch in branches):
        return f"a branch leaves the main path before position {request.start}, from which on tokens are wanted"
    return None


def _score_out_of_range(request: Score, info: EngineInfo) -> str | None:
    end = request.base + len(request.tokens)
    if (problem := _out_of_range(request, end, info)) is not None:
        return problem
    if not 1 <= request.start < end:
        return f"start {request.start} lies outside [1, {end})"
    return None


def _draft_out_of_range(request: Draft, info: EngineInfo) -> str | None:
    end = max(request.base + len(request.tokens), 1)
    if (problem := _out_of_range(request, request.start + request.count, info)) is not None:
        return problem
    if request.start < end:
        return f"a draft starts at position {end} or later, not at {request.start}"
    if request.count < 1 or request.block < 1 or request.rows < 1:
        return f"count, block and rows must be at least 1, not {request.count}, {request.block} and {request.rows}"
    return None


def _out_of_range(request: Request, last: int, info: EngineInfo) -> str | None:
    if last > info.max_length:
        return f"position {last} is beyond this worker's limit of {info.max_length}"
    if info.vocabulary_size and max(request.tokens, default=0) >= info.vocabulary_size:
        return f"token {max(request.tokens)} is outside the vocabulary of {info.vocabulary_size}"
    return None
