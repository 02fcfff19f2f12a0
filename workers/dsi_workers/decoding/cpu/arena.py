"""Memory for weights, in large pages.

From these a core reads faster than from small ones: it fetches ahead beyond the end of a page, and looks up fewer addresses. (On
a Zen 4: 34 GB/s in place of 26.) The system gives large pages to what is large and asks for them, as numpy does from 4 MiB on.
The weights of one layer may be smaller, so many of them share one array.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: float32, whole numbers of 8 bits, or the bits of bfloat16 as uint16.
Array: TypeAlias = NDArray[Any]
#: Of an array that many share. What is not used of it takes no memory.
_SHARED_BYTES = 64 << 20
#: Of a large page.
_PAGE_BYTES = 2 << 20
_LINE_BYTES = 64


class Arena:
    """Where the arrays of one model lie."""

    def __init__(self) -> None:
        self._free: NDArray[np.uint8] = np.empty(0, np.uint8)

    def keep(self, array: Array) -> Array:
        """A copy of the array, which stays as long as something refers to it."""
        room_bytes = -(-array.nbytes // _LINE_BYTES) * _LINE_BYTES
        if room_bytes > len(self._free):
            shared = np.empty(max(_SHARED_BYTES, room_bytes) + _PAGE_BYTES, np.uint8)
            self._free = shared[-shared.ctypes.data % _PAGE_BYTES :]
        copy = self._free[: array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        self._free = self._free[room_bytes:]
        return copy
