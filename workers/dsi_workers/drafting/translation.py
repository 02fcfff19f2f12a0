"""Tokens of one vocabulary into tokens of another: both say the same text, and that is all they share.

What a drafter of another family says becomes the target's tokens as the target's own tokenizer cuts the text; what the
target said becomes the drafter's tokens likewise. A translation that is not the one the model would have used costs a
rejected draft and nothing else. (Guesses by text are from universal assisted decoding, Timor et al., arXiv 2502.05202.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsi_workers.models.files import read_tokenizer
from dsi_workers.session import Session

#: What stands before a piece from the middle of a text, since some tokenizers treat the beginning of a text otherwise:
#: something that the piece does not merge with.
_BEFORE_LETTERS, _BEFORE_OTHERS = "\n", "a"
#: What an incomplete character is decoded to.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
#: Text is cut again from at most so many tokens before its end, and looked at from a beginning of a word so far back.
_TAIL, _NEAR = 128, 16
#: A word is not waited for beyond so many tokens: some scripts have no spaces.
_WORD = 4
#: Bytes, so tokens at most, of a character.
_CHARACTER = 4


class Vocabulary:
    """A tokenizer that may be asked about pieces of texts."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = read_tokenizer(directory)
        self._tokenizer.no_truncation()  # files keep the settings of the last training run
        self._tokenizer.no_padding()
        self._leads: dict[str, list[int]] = {}
        for text in (_BEFORE_LETTERS, _BEFORE_OTHERS):
            lead = self._tokenizer.encode(text, add_special_tokens=False).ids
            if self._tokenizer.decode(lead) == text:
                self._leads[text] = lead

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokens(self, text: str, *, begins: bool = False) -> list[int]:
        """Of a whole text that `begins` here, with the special tokens that the model expects around it, or of a piece."""
        if begins:
            return list(self._tokenizer.encode(text).ids)
        before = _BEFORE_LETTERS if text[:1].isalnum() else _BEFORE_OTHERS
        lead = self._leads.get(before)
        if lead:
            tokens: list[int] = self._tokenizer.encode(before + text, add_special_tokens=False).ids
            if tokens[: len(lead)] == lead:
                return tokens[len(lead) :]
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: Sequence[int], *, begins: bool = False) -> str:
        """Of a whole text or of a piece, as far as its characters are complete; special tokens have none."""
        text: str = self._tokenizer.decode(list(tokens)) if begins else self._piece(tokens)
        return text.rstrip(_INCOMPLETE)

    def complete(self, tokens: Sequence[int]) -> int:
        """How many of the tokens there are before a character at the end that lacks some of its bytes."""
        complete = len(tokens)
        while complete > max(0, len(tokens) - _CHARACTER) and self._piece(tokens[:complete]).endswith(_INCOMPLETE):
            complete -= 1
        return complete

    def says_nothing(self, tokens: Sequence[int]) -> bool:
        """Only special tokens, such as the end of a text."""
        return not self._piece(tokens)

    def _piece(self, tokens: Sequence[int]) -> str:
        lead = self._leads.get(_BEFORE_OTHERS, [])
        text: str = self._tokenizer.decode([*lead, *tokens])
        return text[len(_BEFORE_OTHERS) :] if lead else text


class Translation:
    """One generation in both vocabularies. `session` is the drafter's: it says what the target's says, and may say more."""

    def __init__(self, target: Vocabulary, drafter: Vocabulary, generation: int, correlation: str) -> None:
        self._target, self._drafter = target, drafter
        self.session = Session(generation, 0, correlation)
        self._followed: list[int] = []
        #: The target's tokens [0, _settled) say what the session's [0, _anchor) do; what is beyond is compared as text.
        self._settled = self._anchor = 0
        #: So many characters of what the session says beyond `_anchor` are the target's.
        self._length = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """The target's session has these tokens."""
        if tokens == self._followed:
            return
        if tokens[: self._settled] != self._followed[: self._settled]:
            self._settled = self._anchor = 0
        self._followed = list(tokens)
        text = self._target.text(tokens[self._settled :], begins=self._settled == 0)
        if not self.session.tokens or not self._said().startswith(text):
            anew = self._drafter.tokens(text, begins=self._anchor == 0)
            self.session.write(self._anchor, anew)
            self.session.truncate(self._anchor + len(anew))
            text = self._said()  # some tokenizers change what they cut
        self._length = len(text)
        if len(tokens) - self._settled > _TAIL:
            self._settle()

    def drafts(self, *, whole: bool) -> list[int]:
        """In the target's tokens, what the drafter's session says beyond the target's. Its last word may go on, and would
        then be cut otherwise: it is not among them unless it is `whole`."""
        beyond = self._said()[self._length :]
        if not beyond:
            return []
        near = self._near()
        found = self._target.tokens(self._target.text(near) + beyond)
        if found[: len(near)] == near:
            found = found[len(near) :]
        elif self._target.complete(near) == len(near):
            found = self._target.tokens(beyond)
        else:
            return []
        return found if whole else found[: self._certain(found)]

    def _near(self) -> list[int]:
        """The target's last tokens: from the beginning of a word or, where there is none, of a character, on."""
        end = len(self._followed)
        tail = self._followed[max(0, end - _NEAR) :]
        word = self._word_in(range(max(0, end - _NEAR), end))
        return tail[self._target.complete(tail) :] if word is None else self._followed[word:]

    def _certain(self, found: Sequence[int]) -> int:
        """How many of these tokens are not of the last word, as far as a word goes back, nor of half a character."""
        certain = len(found)
        while certain > max(0, len(found) - _WORD):
            certain -= 1
            if not self._target.text(found[certain : certain + 1])[:1].isalnum():
                break
        return self._target.complete(found[:certain])

    def _said(self) -> str:
        return self._drafter.text(self.session.tokens[self._anchor :], begins=self._anchor == 0)

    def _settle(self) -> None:
        """Find a beginning of a word, some way before the end, where both have cut: what is before it stays as it is."""
        word = self._word_in(range(self._settled + 1, len(self._followed) - _TAIL // 4))
        if word is None:
            return
        said = self._said()
        before = len(self._target.text(self._followed[self._settled : word], begins=self._settled == 0))
        for anchor in range(len(self.session.tokens) - 1, self._anchor, -1):
            rest = self._drafter.text(self.session.tokens[anchor:])
            if len(rest) >= len(said) - before:
                if rest == said[before:]:
                    self._settled, self._anchor, self._length = word, anchor, self._length - before
                return

    def _word_in(self, positions: range) -> int | None:
        """The last of these positions whose token begins a word after a space."""
        for position in reversed(positions):
            text = self._target.text(self._followed[position : position + 1])
            if text[:1] == " " and text[1:2].isalnum():
                return position
        return None
