"""How the tokenizers library is called here: its errors become ours, and other threads run while it works."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from tokenizers import Tokenizer as LibraryTokenizer

from dsi_actors.errors import ConfigError

#: Names that share their beginning: by the next character, "" where one ends.
_Node: TypeAlias = "dict[str, _Node]"


def encode(library: LibraryTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The tokens of `text`. Raises ConfigError if this tokenizer cannot take it.

    The library's `encode` holds Python's global lock for all of its time (1.4 s for 1 MB of English by SmolLM2's
    tokenizer). `encode_batch_fast` releases the lock, and takes half the time because it keeps no offsets.
    """
    _check_unicode(text)
    with library_errors("the tokenizer cannot encode this text"):
        [encoding] = library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """What the library raises becomes a ConfigError that begins with `problem`."""
    try:
        yield
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise ConfigError(f"{problem} ({in_one_line(error)})") from None


def is_library_error(error: BaseException) -> bool:
    """Whether the library raised this. A panic inside the library is a BaseException, but no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def in_one_line(error: BaseException) -> str:
    """The error's own words, or its name if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def parts_of(component: Any, inner: str) -> list[dict[str, Any]]:
    """A decoder, normalizer or pre-tokenizer as tokenizer.json has it: its parts if it is a sequence, which lists them
    under `inner`; else itself; nothing for None."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()), inner)


def _flat(part: dict[str, Any], inner: str) -> list[dict[str, Any]]:
    if part.get("type") != "Sequence":
        return [part]
    return [found for each in part[inner] for found in _flat(each, inner)]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text is no valid Unicode: character {error.start} is U+{ord(text[error.start]):04X}, half of a pair"
        ) from None


def pattern_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of these names, in time that hardly depends on how many there are: they share their beginnings."""
    root: _Node = {}
    for name in names:
        node = root
        for character in name:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_expression(root) if root else r"(?!)")


def _expression(node: _Node) -> str:
    shared = ""
    while len(node) == 1 and "" not in node:
        [(character, node)] = node.items()
        shared += re.escape(character)
    choices = "|".join(re.escape(character) + _expression(after) for character, after in node.items() if character)
    if not choices:
        return shared
    return f"{shared}(?:{choices}){'?' if '' in node else ''}"
