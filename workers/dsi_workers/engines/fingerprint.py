"""Whether two target servers compute the same bits: a checksum of the logits that a fixed text gets."""

from __future__ import annotations

import zlib

from dsi_workers.backend import PROMPT_CHUNK, Backend, Run
from dsi_workers.engine import Never

#: Token ids below this are known to every model.
_WORDS = 97


def fingerprint_of(backend: Backend) -> int:
    """Of the last prompt position and of a window after it. Never 0, which stands for unknown."""
    words = min(_WORDS, backend.vocabulary_size)
    text = [position * 31 % words for position in range(PROMPT_CHUNK + backend.window)]
    prompt = Run(0, text[:PROMPT_CHUNK], 0, PROMPT_CHUNK, PROMPT_CHUNK - 1)
    window = Run(0, text[PROMPT_CHUNK:], PROMPT_CHUNK, 0, PROMPT_CHUNK)
    checksum = 0
    for run in (prompt, window):
        for logits in backend.compute([run], Never()):
            checksum = zlib.crc32(logits.float().cpu().numpy().tobytes(), checksum)
    return checksum or 1
