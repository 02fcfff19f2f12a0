"""Translates tokens between two vocabularies by way of their text, for a drafter whose vocabulary is not the target's.

The drafter's text is tokenized with the target's tokenizer, and the target's text with the drafter's. If the target model
would have tokenized a text differently, a draft is rejected; nothing else happens. (Drafting by way of text is from universal
assisted decoding, Timor et al., arXiv 2502.05202.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsi_workers.models.files import read_tokenizer
from dsi_workers.session import Session

#: Put before a piece from the middle of a text, because some tokenizers treat the beginning of a text differently. The first is
#: for pieces that begin with a letter or digit. A tokenizer does not merge either character with the piece.
_BEFORE_LETTERS, _BEFORE_OTHERS = "\n", "a"
#: The tokenizer decodes an incomplete character to this.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
#: When more than this many target tokens are not aligned yet, the alignment moves forward.
_TAIL = 128
#: So far before the end of the text the alignment stays: tokens there may still change.
_UNSETTLED = _TAIL // 4
#: So many tokens before that are looked through for a place to align at, and so many places are tried.
_LOOKED_THROUGH, _MOST_ANCHORS = 4 * _TAIL, 8
#: The most target tokens before a draft that are tokenized together with the draft.
_CONTEXT = 16
#: The most tokens of an unfinished word that are held back: some scripts have no spaces.
_MOST_HELD_BACK = 4
#: The most tokens of one character, which has up to four bytes.
_CHARACTER = 4


class Vocabulary:
    """A tokenizer that also converts pieces from the middle of a text."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = read_tokenizer(directory)
        self._tokenizer.no_truncation()  # tokenizer files keep these settings from training
        self._tokenizer.no_padding()
        #: The tokens of each lead character, if the tokenizer can represent it.
        self._lead_tokens: dict[str, list[int]] = {}
        for text in (_BEFORE_LETTERS, _BEFORE_OTHERS):
            lead = self._tokenizer.encode(text, add_special_tokens=False).ids
            if self._tokenizer.decode(lead) == text:
                self._lead_tokens[text] = lead

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokens(self, text: str, *, begins: bool = False) -> list[int]:
        """Tokenize a text.

        With `begins`, the text is complete from its beginning, and gets the special tokens that the model expects. Without it,
        the text is a piece from the middle of a text.
        """
        if begins:
            return list(self._tokenizer.encode(text).ids)
        before = _BEFORE_LETTERS if text[:1].isalnum() else _BEFORE_OTHERS
        lead = self._lead_tokens.get(before)
        if lead:
            tokens: list[int] = self._tokenizer.encode(before + text, add_special_tokens=False).ids
            if tokens[: len(lead)] == lead:
                return tokens[len(lead) :]
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: Sequence[int], *, begins: bool = False) -> str:
        """The text of these tokens, without an incomplete character at the end. Special tokens have no text.

        `begins`: the tokens are those of a text from its beginning.
        """
        text: str = self._tokenizer.decode(list(tokens)) if begins else self._text_of_piece(tokens)
        return text.rstrip(_INCOMPLETE)

    def complete(self, tokens: Sequence[int]) -> int:
        """The number of tokens before an incomplete character at the end; all of them if the last character is complete."""
        complete = len(tokens)
        while complete > max(0, len(tokens) - _CHARACTER) and self._text_of_piece(tokens[:complete]).endswith(
            _INCOMPLETE
        ):
            complete -= 1
        return complete

    def says_nothing(self, tokens: Sequence[int]) -> bool:
        """True if the tokens have no text: they are all special, such as the end-of-text token."""
        return not self._text_of_piece(tokens)

    def _text_of_piece(self, tokens: Sequence[int]) -> str:
        lead = self._lead_tokens.get(_BEFORE_OTHERS, [])
        text: str = self._tokenizer.decode([*lead, *tokens])
        return text[len(_BEFORE_OTHERS) :] if lead else text


class Translation:
    """The text of one generation in both vocabularies.

    `followed` holds the target's tokens, `session` the drafter's. The text of `session` is that of `followed`, and possibly
    drafts after it.
    """

    def __init__(self, target: Vocabulary, drafter: Vocabulary, followed: Session) -> None:
        self._target, self._drafter = target, drafter
        self.followed = followed
        self.session = Session(followed.generation, 0, followed.correlation)
        #: Of `followed`, the revision and the number of tokens that `session` is in line with.
        self._seen = followed.revision, 0
        #: Alignments, the latest last. The target's tokens [0, a) and the drafter's tokens [0, b) are known to have the same
        #: text. Only tokens after the latest one are compared as text. The earlier ones are for a correction that lies before it.
        self._alignments = [(0, 0)]
        #: Of the drafter's text after its aligned tokens, this many characters are the target's. The rest are drafts.
        self._known_characters = 0

    @property
    def _aligned_target(self) -> int:
        return self._alignments[-1][0]

    @property
    def _aligned_drafter(self) -> int:
        return self._alignments[-1][1]

    def follow(self) -> None:
        """Bring `session` in line with the target's tokens. Drafts after them are kept if the target's text agrees."""
        tokens, seen = self.followed.tokens, (self.followed.revision, len(self.followed.tokens))
        if seen == self._seen:
            return
        unchanged = self.followed.unchanged_since(self._seen[0])
        while self._aligned_target > unchanged:
            self._alignments.pop()
        self._seen = seen
        text = self._target.text(tokens[self._aligned_target :], begins=self._aligned_target == 0)
        if not self.session.tokens or not self._unaligned_text().startswith(text):
            anew = self._drafter.tokens(text, begins=self._aligned_drafter == 0)
            self.session.write(self._aligned_drafter, anew)
            self.session.truncate(self._aligned_drafter + len(anew))
            text = self._unaligned_text()  # some tokenizers change the text that they tokenize
        self._known_characters = len(text)
        if len(tokens) - self._aligned_target > _TAIL:
            self._align()

    def drafts(self, *, whole: bool) -> list[int]:
        """Return the drafter's text after the target's text, in the target's tokens.

        The last word is held back unless the text is `whole`: the word might continue, and the target would then tokenize it
        differently.
        """
        beyond = self._unaligned_text()[self._known_characters :]
        if not beyond:
            return []
        near = self._context_tokens()
        found = self._target.tokens(self._target.text(near) + beyond)
        if found[: len(near)] == near:
            found = found[len(near) :]
        elif self._target.complete(near) == len(near):
            found = self._target.tokens(beyond)
        else:
            return []
        return found if whole else found[: self._number_of_final_tokens(found)]

    def _context_tokens(self) -> list[int]:
        """The target's last tokens, starting at a word; where no word starts, at a character."""
        tokens = self.followed.tokens
        tail = tokens[-_CONTEXT:]
        word = next(self._word_starts(range(max(0, len(tokens) - _CONTEXT), len(tokens))), None)
        return tail[self._target.complete(tail) :] if word is None else tokens[word:]

    def _number_of_final_tokens(self, found: Sequence[int]) -> int:
        """The number of tokens that will not change: those before the last word and before an incomplete character."""
        final = len(found)
        while final > max(0, len(found) - _MOST_HELD_BACK):
            final -= 1
            if not self._target.text(found[final : final + 1])[:1].isalnum():
                break
        return self._target.complete(found[:final])

    def _unaligned_text(self) -> str:
        """The drafter's text after its aligned tokens."""
        return self._drafter.text(self.session.tokens[self._aligned_drafter :], begins=self._aligned_drafter == 0)

    def _align(self) -> None:
        """Move the alignment forward to a place, well before the end, that begins a token in both vocabularies: a word, or, in
        scripts without spaces, a character."""
        end = len(self.followed.tokens) - _UNSETTLED
        positions = range(max(self._aligned_target + 1, end - _LOOKED_THROUGH), end)
        places: Iterator[int] = itertools.islice(self._word_starts(positions), _MOST_ANCHORS)
        if len(positions) > _TAIL:
            places = itertools.chain(places, itertools.islice(self._character_starts(positions), _MOST_ANCHORS))
        unaligned = self._unaligned_text()
        for place in places:
            settled = self.followed.tokens[self._aligned_target : place]
            before = len(self._target.text(settled, begins=self._aligned_target == 0))
            anchor = self._token_that_begins(unaligned[before:])
            if anchor is not None:
                self._known_characters -= before
                self._alignments.append((place, anchor))
                return

    def _token_that_begins(self, text: str) -> int | None:
        """The position of the drafter's token from which on the drafter's text is `text`. None if no token begins there."""
        for anchor in range(len(self.session.tokens) - 1, self._aligned_drafter, -1):
            rest = self._drafter.text(self.session.tokens[anchor:])
            if len(rest) >= len(text):
                return anchor if rest == text else None
        return None

    def _word_starts(self, positions: range) -> Iterator[int]:
        """Those of these positions whose target token is a space and the beginning of a word, the last first."""
        for position in reversed(positions):
            text = self._target.text(self.followed.tokens[position : position + 1])
            if text[:1] == " " and text[1:2].isalnum():
                yield position

    def _character_starts(self, positions: range) -> Iterator[int]:
        """Those of these positions that have a whole character before them and begin another one, the last first."""
        for position in reversed(positions):
            before = self.followed.tokens[max(0, position - _CHARACTER) : position]
            begins = self._target.text(self.followed.tokens[position : position + 1])
            if begins and self._target.complete(before) == len(before):
                yield position
