"""A checksum of the logits of a fixed text: it differs where two target servers compute different bits.

The version of the library for structured output belongs to it, since it decides which tokens a grammar allows.
"""

from __future__ import annotations

import zlib

from dsi_workers.backend import Backend, Run
from dsi_workers.engine import Never
from dsi_workers.grammar import grammar_checksum

#: The text has token ids below this, which every model knows.
_WORDS = 97


def fingerprint_of(backend: Backend) -> int:
    """The CRC-32 of the logits after a prompt of one chunk and after each position of the window that follows, of the number of
    devices that compute them together, and of the backend's build.

    Never 0, which stands for unknown. Overwrites slot 0.
    """
    words, chunk = min(_WORDS, backend.vocabulary_size), backend.prompt_chunk
    text = [position * 31 % words for position in range(chunk + backend.window)]
    prompt = Run(0, text[:chunk], 0, chunk, chunk - 1)
    window = Run(0, text[chunk:], chunk, 0, chunk)
    checksum = zlib.crc32(backend.devices.to_bytes(2, "little"), grammar_checksum())
    checksum = zlib.crc32(backend.build.encode(), checksum)
    for run in (prompt, window):
        for logits in backend.compute([run], Never()):
            checksum = zlib.crc32(logits.float().cpu().numpy().tobytes(), checksum)
    return checksum or 1
