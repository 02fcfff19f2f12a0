"""A picture as one HTML file that needs nothing else: lanes of work as SVG, and the text coloured by how each token came."""

from __future__ import annotations

from html import escape

from dsi_actors.tracing.lanes import Picture, Span

_COLOURS = {"useful": "#2e9e5b", "wasted": "#d9a441", "cancelled": "#c9453f", "running": "#8a8f98"}
_LEFT, _RIGHT, _LANE, _GAP, _TOP = 190, 50, 34, 12, 46
_MS_PER_TICK = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_LEAST_WIDTH, _PIXELS_PER_SPAN = 1100, 16

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #1d2126; }
h1 { font-size: 1.3rem; } .scroll { overflow-x: auto; border: 1px solid #d6dae0; border-radius: 6px; }
.key span { margin-right: 1.2rem; white-space: nowrap; }
.box { display: inline-block; width: .9em; height: .9em; border-radius: 2px; }
.text { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; background: #f6f7f9; padding: 1rem; border-radius: 6px; }
.drafted { background: #cdebd8; border-radius: 3px; } .own { background: #ffe1b8; border-radius: 3px; }
"""


def html_page(picture: Picture, title: str) -> str:
    accepted = picture.accepted
    took_ms = picture.to_ms - picture.from_ms
    summary = (
        f"{len(accepted)} tokens in {took_ms:.0f} ms, {took_ms / max(1, len(accepted)):.1f} ms each. "
        f"{sum(accepted)} had been guessed by the drafter and were right; {accepted.count(False)} are the target's own."
    )
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1><p>{summary}</p>{_key()}<div class=scroll>{_svg(picture)}</div>",
            "<h2>The text, by how each token came</h2>",
            "<p class=key><span><i class='box drafted'></i> guessed, and verified</span>",
            "<span><i class='box own'></i> the target's own</span></p>",
            _text(picture),
            "<p>Several target servers verify successive guesses of one request at the same time. Where a guess is wrong (red",
            "line) everything built on it is cancelled, and the target's own token stands. The text is the same as without any",
            "guess.</p></html>\n",
        ]
    )


def _key() -> str:
    words = {
        "useful": "work that counted", "wasted": "guessed wrong, or answered too late", "cancelled": "cancelled while it ran",
    }  # fmt: skip
    boxes = "".join(
        f"<span><i class=box style='background:{_COLOURS[fate]}'></i> {text}</span>" for fate, text in words.items()
    )
    return (
        f"<p class=key>{boxes}<span>▼ tokens settled</span><span style='color:#c9453f'>┃ a guess was wrong</span></p>"
    )


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
        parts.append(f"<text x={x(commit.at_ms):.1f} y={_TOP - 12} text-anchor=middle>▼<title>{words}</title></text>")
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
    return (
        f"<g><title>{escape(title)}</title><rect x={left:.1f} y={top} width={width:.1f} height={_LANE} rx=3 "
        f"fill='{_COLOURS[span.fate]}'/><text x={left + 4:.1f} y={top + _LANE / 2 + 4} fill=white>{label}</text></g>"
    )


def _text(picture: Picture) -> str:
    accepted = picture.accepted
    texts = list(picture.texts) or [f"·{index} " for index in range(len(accepted))]
    spans = [
        f"<span class={'drafted' if flag else 'own'}>{escape(text)}</span>"
        for text, flag in zip(texts, accepted, strict=False)
    ]
    return f"<div class=text>{''.join(spans)}</div>"
