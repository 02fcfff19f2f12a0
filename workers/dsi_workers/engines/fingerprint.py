"""A checksum of the logits of a fixed text: it differs where two target servers compute different bits."""

from __future__ import annotations

import zlib

from dsi_workers.backend import PROMPT_CHUNK, Backend, Run
from dsi_workers.engine import Never

#: The text has token ids below this, which every model knows.
_WORDS = 97


def fingerprint_of(backend: Backend) -> int:
    """The CRC-32 of the logits after a prompt of one chunk and after each position of the window that follows.

    Never 0, which stands for unknown. Overwrites slot 0.
    """
    words = min(_WORDS, backend.vocabulary_size)
    text = [position * 31 % words for position in range(PROMPT_CHUNK + backend.window)]
    prompt = Run(0, text[:PROMPT_CHUNK], 0, PROMPT_CHUNK, PROMPT_CHUNK - 1)
    window = Run(0, text[PROMPT_CHUNK:], PROMPT_CHUNK, 0, PROMPT_CHUNK)
    checksum = 0
    for run in (prompt, window):
        for logits in backend.compute([run], Never()):
            checksum = zlib.crc32(logits.float().cpu().numpy().tobytes(), checksum)
    return checksum or 1
