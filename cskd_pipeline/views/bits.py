"""Reproducible randomness: a counter-based bit stream and the distributions derived from it.

numpy guarantees the raw stream of ``Philox`` but not the output of its ``Generator``, so the maps
to floats, integers, normals and betas are defined here. They use integers and table look-ups
wherever possible; results of logarithms and powers are rounded far above the last bit.
"""

import hashlib
import math
from functools import cache
from statistics import NormalDist

import numpy as np

NORMAL_UNITS = 256
"""Normals are multiples of 1/256, which are exact in float16 and float32."""
BETA_UNITS = 65536
_CHUNK = 16  # 64-bit words fetched at a time; most views need fewer


def derive_seed(*parts: int | str | bytes) -> int:
    """Return a 64-bit seed that depends on the value, type and position of every part.

    It is the first 8 bytes (little endian) of BLAKE2b over, for each part: a type letter (b, s, i),
    its length in 8 bytes, and its bytes (a string's UTF-8, an integer's decimal digits).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind = "b" if isinstance(part, bytes) else "s" if isinstance(part, str) else "i"
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(kind.encode() + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def view_seed(root_seed: int, key: str, view: int) -> int:
    """Return the seed of a sample's view, independent of worker, rank and order."""
    return derive_seed("view", root_seed, key, view)


@cache
def normal_table() -> np.ndarray:
    """Return the standard normal's quantiles at (i + 0.5)/65536, times 256, (65536,) int16.

    Rounding hides differences between platforms' logarithms; a test pins the CRC-32.
    """
    quantile = NormalDist().inv_cdf
    upper = [round(NORMAL_UNITS * quantile((i + 0.5) / 65536)) for i in range(32768, 65536)]
    return np.array([-z for z in reversed(upper)] + upper, np.int16)


class BitStream:
    """Draws from the Philox4x64 stream with key ``seed`` (unsigned 64-bit) and counter 0.

    Each draw consumes the next 64-bit word, unless stated otherwise.
    """

    __slots__ = ("_philox", "_words")

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=seed, counter=0)
        self._words: list[int] = []  # fetched but unused, in reverse order

    def uint64(self) -> int:
        """Return the next 64 bits."""
        if not self._words:
            self._words = self._philox.random_raw(_CHUNK).tolist()[::-1]
        return self._words.pop()

    def raw(self, count: int) -> np.ndarray:
        """Return the next ``count`` words, (count,) uint64."""
        fetched = [self._words.pop() for _ in range(min(count, len(self._words)))]
        fresh = self._philox.random_raw(count - len(fetched))
        return np.concatenate([np.array(fetched, np.uint64), fresh])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a uniform number in [low, high) from the word's upper 53 bits."""
        return low + (high - low) * ((self.uint64() >> 11) * 2.0**-53)

    def log_uniform(self, low: float, high: float) -> float:
        """Draw a number whose logarithm is uniform between log(low) and log(high)."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def below(self, bound: int) -> int:
        """Draw an integer in [0, bound) by multiply and shift, with bias below bound / 2**64."""
        return (self.uint64() * bound) >> 64

    def chance(self, probability: float) -> bool:
        """Return True with ``probability``: never for 0, always for 1."""
        return self.uniform() < probability

    def normal(self) -> float:
        """Draw a standard normal, a multiple of 1/256 within 4.4, from the word's upper 16 bits."""
        return int(normal_table()[self.uint64() >> 48]) / NORMAL_UNITS

    def normals(self, count: int) -> np.ndarray:
        """Draw standard normals times 256, (count,) int16, four per word, lowest bits first."""
        words = self.raw(-(-count // 4)).astype("<u8")
        return normal_table()[words.view("<u2")[:count]]

    def beta(self, a: float, b: float) -> float:
        """Draw Beta(a, b), a multiple of 1/65536, by Jöhnk's rejection: two words per attempt."""
        while True:
            x, y = self.uniform() ** (1.0 / a), self.uniform() ** (1.0 / b)
            if 0.0 < x + y <= 1.0:
                return round(x / (x + y) * BETA_UNITS) / BETA_UNITS
