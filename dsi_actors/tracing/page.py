"""A picture as one HTML file that needs nothing else: lanes of work and the drafts as SVG, and the text coloured by how each
token came."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from dsi_actors.tracing.branches import IN_TEXT, UNUSED, WRONG, drafts_by_position
from dsi_actors.tracing.drafts import Came
from dsi_actors.tracing.lanes import Picture, Span

_COLOURS = {"useful": "#2e9e5b", "wasted": "#d9a441", "cancelled": "#c9453f", "running": "#8a8f98"}
#: Of what belongs to a branch: one that was right, and others.
_HIT, _BRANCHES = "#6d4fc4", "#ffffff"
#: The share of a bar's height that its branches take.
_STRIPE = 0.28
_LEFT, _RIGHT, _LANE, _GAP, _TOP = 190, 50, 34, 12, 46
_MS_PER_TICK = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_LEAST_WIDTH, _PIXELS_PER_SPAN = 1100, 16

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #1d2126; }
h1 { font-size: 1.3rem; } .scroll { overflow-x: auto; border: 1px solid #d6dae0; border-radius: 6px; }
.key span { margin-right: 1.2rem; white-space: nowrap; }
.box { display: inline-block; width: .9em; height: .9em; border-radius: 2px; }
.text { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; background: #f6f7f9; padding: 1rem; border-radius: 6px; }
.text span { border-radius: 3px; }
"""
#: Backgrounds of the text.
_OF_TEXT = {Came.ACCEPTED: "#cdebd8", Came.ALTERNATIVE: "#d8cbf7", Came.OWN: "#ffe1b8"}


def html_page(picture: Picture, title: str) -> str:
    came = picture.came
    took_ms = picture.to_ms - picture.from_ms
    alternatives = came.count(Came.ALTERNATIVE)
    by_alternative = f", {alternatives} of them as an alternative to its first choice" if alternatives else ""
    summary = (
        f"{len(came)} tokens in {took_ms:.0f} ms, {took_ms / max(1, len(came)):.1f} ms each. "
        f"{len(came) - came.count(Came.OWN)} had been guessed by the drafter and were right{by_alternative}; "
        f"{came.count(Came.OWN)} are the target's own."
    )
    branches = _has_branches(picture)
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1><p>{summary}</p>{_key(branches=branches)}<div class=scroll>{_svg(picture)}</div>",
            "<h2>The drafts, by position</h2>",
            "<p>The first row is the text. Below it stands what was drafted and is not in the text, under the position where it",
            f"left the text. Point at a square to see its token.</p>{_key_of_drafts(branches=branches)}",
            f"<div class=scroll>{drafts_by_position(picture)}</div>",
            "<h2>The text, by how each token came</h2>",
            f"{_key_of_text(branches=branches)}{_text(picture)}",
            "<p>Several target servers verify successive guesses of one request at the same time. Where a guess is wrong (red",
            "line) everything built on it is cancelled, and the target's own token stands."
            + (" Where an alternative to the wrong guess is right (◆) its branch goes on instead." if branches else ""),
            "The text is the same as without any guess.</p></html>\n",
        ]
    )


def _has_branches(picture: Picture) -> bool:
    return any(span.branches for lane in picture.lanes.values() for span in lane)


def _key(*, branches: bool) -> str:
    words = {
        "useful": "work that counted", "wasted": "guessed wrong, or answered too late", "cancelled": "cancelled while it ran",
    }  # fmt: skip
    boxes = "".join(
        f"<span><i class=box style='background:{_COLOURS[fate]}'></i> {text}</span>" for fate, text in words.items()
    )
    more = ""
    if branches:
        green, amber = _COLOURS["useful"], _COLOURS["wasted"]
        more = (
            f"<span><i class=box style='background:linear-gradient({amber} 60%,#fff 60% 80%,{amber} 80%)'></i> with branches"
            f"</span><span><i class=box style='background:linear-gradient({green} 60%,{_HIT} 60%)'></i> one of its branches was "
            f"right</span><span style='color:{_HIT}'>◆ an alternative was right: its branch is the main path now</span>"
        )
    return (
        f"<p class=key>{boxes}{more}<span>▼ tokens settled</span>"
        "<span style='color:#c9453f'>┃ a guess was wrong</span></p>"
    )


def _legend(words: Mapping[str, str]) -> str:
    """What each colour means."""
    boxes = "".join(
        f"<span><i class=box style='background:{colour}'></i> {text}</span>" for colour, text in words.items()
    )
    return f"<p class=key>{boxes}</p>"


def _key_of_drafts(*, branches: bool) -> str:
    words = {IN_TEXT[Came.ACCEPTED]: "text: the drafter's first choice was right"}
    if branches:
        words[IN_TEXT[Came.ALTERNATIVE]] = "text: an alternative was right"
    words[IN_TEXT[Came.OWN]] = "text: the target's own"
    words[WRONG] = "first choice of the drafter that was wrong, and what was drafted behind it"
    if branches:
        words[UNUSED] = "an alternative that was not needed, and what was drafted behind it"
    return _legend(words)


def _key_of_text(*, branches: bool) -> str:
    more = {_OF_TEXT[Came.ALTERNATIVE]: "guessed as an alternative, and verified"} if branches else {}
    return _legend({_OF_TEXT[Came.ACCEPTED]: "guessed, and verified", **more, _OF_TEXT[Came.OWN]: "the target's own"})


def _svg(picture: Picture) -> str:
    spans = sum(len(lane) for lane in picture.lanes.values())
    width = max(_LEAST_WIDTH, _PIXELS_PER_SPAN * spans) + _LEFT + _RIGHT
    height = _TOP + len(picture.lanes) * (_LANE + _GAP) + 10
    span_ms = max(1e-6, picture.to_ms - picture.from_ms)
    scale = (width - _LEFT - _RIGHT) / span_ms

    def x(at_ms: float) -> float:
        return _LEFT + (at_ms - picture.from_ms) * scale

    parts = [
        f"<svg width={width} height={height} xmlns='http://www.w3.org/2000/svg' font-family='system-ui' font-size=12>"
    ]
    tick_ms = next((tick for tick in _MS_PER_TICK if tick * scale >= 60), _MS_PER_TICK[-1])
    for tick in range(int(span_ms / tick_ms) + 1):
        at = x(picture.from_ms + tick * tick_ms)
        parts.append(f"<line x1={at:.1f} x2={at:.1f} y1={_TOP - 8} y2={height} stroke='#e4e7eb'/>")
        parts.append(f"<text x={at + 2:.1f} y=12 fill='#6b7280'>{tick * tick_ms} ms</text>")
    for at_ms in picture.rejections_ms:
        parts.append(
            f"<line x1={x(at_ms):.1f} x2={x(at_ms):.1f} y1={_TOP - 4} y2={height} stroke='#c9453f' stroke-width=1.5 "
            "stroke-opacity=.55><title>a guess was wrong</title></line>"
        )
    for commit in picture.commits:
        words = f"{len(commit.accepted)} settled from {commit.start}, {sum(commit.accepted)} of them guessed"
        mark, colour = "▼", "#1d2126"
        if commit.alternatives:
            mark, colour = "◆", _HIT
            words += f", {len(commit.alternatives)} as an alternative"
        parts.append(
            f"<text x={x(commit.at_ms):.1f} y={_TOP - 12} text-anchor=middle fill='{colour}'>{mark}<title>{words}</title></text>"
        )
    for row, (name, lane) in enumerate(picture.lanes.items()):
        top = _TOP + row * (_LANE + _GAP)
        parts.append(f"<text x=8 y={top + _LANE / 2 + 4} fill='#1d2126'>{escape(name)}</text>")
        parts += [_bar(span, x(span.from_ms), x(span.to_ms), top) for span in lane]
    return "".join(parts) + "</svg>"


def _bar(span: Span, left: float, right: float, top: float) -> str:
    width = max(1.5, right - left - 1)
    title = f"{span.words} ({span.to_ms - span.from_ms:.1f} ms, {span.fate})"
    label = f"{span.start}–{span.end}" if span.end > span.start else str(span.start)
    label = label if width > 44 else ""
    stripe = ""
    if span.branches:  # below what the bar says of the main path
        colour, height = (_HIT, _LANE * _STRIPE) if span.hit else (_BRANCHES, _LANE * _STRIPE / 2)
        stripe = f"<rect x={left:.1f} y={top + _LANE * (1 - _STRIPE):.1f} width={width:.1f} height={height:.1f} fill='{colour}'/>"
        label += f" +{span.branches}" if label and width > 66 else ""
    return (
        f"<g><title>{escape(title)}</title><rect x={left:.1f} y={top} width={width:.1f} height={_LANE} rx=3 "
        f"fill='{_COLOURS[span.fate]}'/>{stripe}"
        f"<text x={left + 4:.1f} y={top + _LANE / 2 + 2} fill=white>{label}</text></g>"
    )


def _text(picture: Picture) -> str:
    came = picture.came
    texts = list(picture.texts) or [f"·{index} " for index in range(len(came))]
    spans = [
        f"<span style='background:{_OF_TEXT[how]}'>{escape(text)}</span>"
        for text, how in zip(texts, came, strict=False)
    ]
    return f"<div class=text>{''.join(spans)}</div>"
