"""A picture as a Chrome trace: open it in chrome://tracing or ui.perfetto.dev. (The Trace Event Format, JSON object form.)"""

from __future__ import annotations

from typing import Any

from dsi_actors.tracing.lanes import Picture


def chrome_trace(picture: Picture) -> dict[str, Any]:
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "generation"}}]
    for lane, (name, spans) in enumerate(picture.lanes.items(), 1):
        events.append({"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": name}})
        for span in spans:
            events.append(
                {
                    "ph": "X", "pid": 1, "tid": lane, "name": span.words, "cat": span.fate,
                    "ts": span.from_ms * 1e3, "dur": max(1.0, (span.to_ms - span.from_ms) * 1e3),
                    "args": {
                        "start": span.start, "end": span.end, "fate": span.fate, "branches": span.branches, "hit": span.hit,
                    },
                }
            )  # fmt: skip
    for commit in picture.commits:
        args = {
            "start": commit.start, "tokens": len(commit.accepted), "accepted": sum(commit.accepted),
            "alternatives": len(commit.alternatives),
        }  # fmt: skip
        events.append(
            {"ph": "i", "s": "p", "pid": 1, "tid": 0, "name": "commit", "ts": commit.at_ms * 1e3, "args": args}
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
