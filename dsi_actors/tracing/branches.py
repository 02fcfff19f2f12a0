"""All drafts of a picture as one SVG: a column for each position, the text in the first row, and below it what was drafted and is
not in the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from dsi_actors.tracing.drafts import Came, Guess
from dsi_actors.tracing.lanes import Picture

_CELL, _ROW, _LEFT, _TOP = 15, 17, 8, 22
#: Colours.
IN_TEXT = {Came.ACCEPTED: "#7ccb9b", Came.ALTERNATIVE: "#a78ae8", Came.OWN: "#f2b661"}
WRONG, UNUSED, _PENDING = "#e79a95", "#c5cbd4", "#8a8f98"
#: More rows than this are not drawn.
_MOST_ROWS = 40
_POSITIONS_PER_TICK = 10


@dataclass(slots=True)
class _Strip:
    """Drafts of which each is the first choice behind the one before. It leaves `row`, the text's or another strip's."""

    parent: _Strip | None
    guesses: list[Guess]
    #: Whether its first token was the drafter's first choice at its place.
    first_choice: bool
    row: int = field(default=0)

    @property
    def start(self) -> int:
        return self.guesses[0].position

    @property
    def end(self) -> int:
        return self.guesses[-1].position + 1


def drafts_by_position(picture: Picture) -> str:
    """The SVG. Empty if nothing was settled or drafted."""
    first = picture.drafts.first
    if first is None:
        return ""
    text = list(_text_of(first))
    strips = _packed(sorted(_strips(first, text), key=lambda strip: strip.start))
    begin = first.position + 1
    end = max([begin + len(text), *(strip.end for strip in strips)])
    rows = max((strip.row for strip in strips), default=0)
    width, height = 2 * _LEFT + (end - begin) * _CELL, _TOP + (rows + 1) * _ROW + 8
    parts = [
        f"<svg width={width} height={height} xmlns='http://www.w3.org/2000/svg' font-family='system-ui' font-size=10>"
    ]
    for position in range(begin, end):
        if (position - begin) % _POSITIONS_PER_TICK == 0:
            parts.append(f"<text x={_x(position, begin)} y=12 fill='#6b7280'>{position}</text>")
    for strip in strips:
        from_row = 0 if strip.parent is None else strip.parent.row
        at = _x(strip.start, begin) - (_CELL - _ROW + 4) / 2
        parts.append(
            f"<path d='M{at} {_y(from_row) + 7}V{_y(strip.row) + 7}h4' fill=none stroke='#aab1bc' stroke-width=1 />"
        )
    texts = dict(enumerate(picture.texts, begin))
    for guess in text:
        assert guess.came is not None
        words = f"{guess.position}: {texts.get(guess.position, '')!r} (token {guess.token}), {_CAME[guess.came]}"
        parts.append(_square(guess, 0, begin, IN_TEXT[guess.came], words))
    settled = begin + len(text)
    for strip in strips:
        kind = "first choice of the drafter" if strip.first_choice else "alternative"
        for guess in strip.guesses:
            colour = _PENDING if strip.start >= settled else WRONG if strip.first_choice else UNUSED
            words = (
                f"{guess.position}: token {guess.token}, {kind if guess is strip.guesses[0] else 'drafted behind it'}"
            )
            parts.append(_square(guess, strip.row, begin, colour, words))
    return "".join(parts) + "</svg>"


_CAME = {
    Came.ACCEPTED: "the drafter's first choice",
    Came.ALTERNATIVE: "an alternative of the drafter",
    Came.OWN: "the target's own",
}


def _text_of(first: Guess) -> Iterator[Guess]:
    guess: Guess | None = first
    while guess is not None:
        guess = next((child for child in guess.children.values() if child.came is not None), None)
        if guess is not None:
            yield guess


def _strips(first: Guess, text: list[Guess]) -> Iterator[_Strip]:
    """Those that leave the text, each followed by those that leave it."""
    for guess in (first, *text):
        drafted = [child for child in guess.children.values() if child.block is not None]
        for child in drafted:
            if child.came is None:
                yield from _strips_from(child, None, first_choice=child is drafted[0])


def _strips_from(guess: Guess, parent: _Strip | None, *, first_choice: bool) -> Iterator[_Strip]:
    strip = _Strip(parent, [guess], first_choice)
    yield strip
    while guess.children:
        guess, *others = guess.children.values()
        strip.guesses.append(guess)
        for other in others:
            yield from _strips_from(other, strip, first_choice=False)


def _packed(strips: list[_Strip]) -> list[_Strip]:
    """Each in the first row below the one that it leaves where there is room for it."""
    ends: list[int] = [1 << 60]  # of each row, the first free position; row 0 is the text
    for strip in strips:
        above = 0 if strip.parent is None else strip.parent.row
        strip.row = next((row for row in range(above + 1, len(ends)) if ends[row] < strip.start), len(ends))
        if strip.row == len(ends):
            ends.append(0)
        ends[strip.row] = strip.end
    return [strip for strip in strips if strip.row <= _MOST_ROWS]


def _x(position: int, begin: int) -> int:
    return _LEFT + (position - begin) * _CELL


def _y(row: int) -> int:
    return _TOP + row * _ROW


def _square(guess: Guess, row: int, begin: int, colour: str, words: str) -> str:
    return (
        f"<rect x={_x(guess.position, begin) + 1} y={_y(row)} width={_CELL - 2} height={_ROW - 4} rx=2 fill='{colour}'>"
        f"<title>{escape(words)}</title></rect>"
    )
