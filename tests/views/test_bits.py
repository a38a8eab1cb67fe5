"""The bit stream and its distributions: pinned, and computed independently."""

from __future__ import annotations

import hashlib
import math
import zlib
from statistics import NormalDist

import numpy as np
import pytest

from cskd_pipeline.views.bits import BitStream, derive_seed, normal_table, view_seed

SEED = 20230711
# Philox4x64-10 with key (SEED, 0), counter from 0; numpy guarantees this stream.
WORDS = np.random.Philox(key=SEED, counter=0).random_raw(64).tolist()


def test_the_raw_stream_is_pinned() -> None:
    assert WORDS[:4] == [
        5259857398493241282,
        8407553990957994188,
        2872404632739348748,
        1514017717632837740,
    ]
    bits = BitStream(SEED)
    assert [bits.uint64() for _ in range(3)] == WORDS[:3]
    assert bits.raw(40).tolist() == WORDS[3:43]
    assert bits.uint64() == WORDS[43]


def test_uniform_is_the_upper_53_bits_and_below_is_multiply_and_shift() -> None:
    assert BitStream(SEED).uniform() == (WORDS[0] >> 11) / 2**53
    assert BitStream(SEED).uniform(-2.0, 6.0) == -2.0 + 8.0 * ((WORDS[0] >> 11) / 2**53)
    assert BitStream(SEED).below(1000) == WORDS[0] * 1000 // 2**64
    assert BitStream(SEED).log_uniform(0.5, 8.0) == pytest.approx(
        math.exp(math.log(0.5) + math.log(16.0) * (WORDS[0] >> 11) / 2**53)
    )


def test_chance_is_never_for_0_and_always_for_1() -> None:
    bits = BitStream(SEED)
    assert not any(bits.chance(0.0) for _ in range(1000))
    assert all(bits.chance(1.0) for _ in range(1000))


def test_the_normal_table_is_pinned_and_is_the_normals_quantiles() -> None:
    table = normal_table()
    assert zlib.crc32(table.astype("<i2").tobytes()) == 2074489059
    assert np.array_equal(table, -table[::-1])
    exact = [256 * NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(0, 65536, 97)]
    assert np.abs(table[::97] - np.array(exact)).max() <= 0.5
    assert abs(float((table / 256.0).std()) - 1.0) < 1e-3


def test_normals_take_four_draws_from_a_word_lowest_bits_first() -> None:
    sixteen = [(word >> shift) & 0xFFFF for word in WORDS[:3] for shift in (0, 16, 32, 48)]
    expected = normal_table()[np.array(sixteen[:10])]
    assert np.array_equal(BitStream(SEED).normals(10), expected)
    assert BitStream(SEED).normals(10).dtype == np.int16
    assert BitStream(SEED).normal() == normal_table()[WORDS[0] >> 48] / 256


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.8), (1.0, 1.0), (0.2, 3.0)])
def test_beta_draws_have_the_distributions_mean_and_variance(a: float, b: float) -> None:
    bits = BitStream(SEED)
    draws = np.array([bits.beta(a, b) for _ in range(20_000)])
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert abs(draws.mean() - a / (a + b)) < 5 * math.sqrt(variance / len(draws))
    assert abs(draws.var() - variance) < 0.05 * variance
    assert np.array_equal(draws * 65536, np.round(draws * 65536))


def test_seeds_depend_on_every_part_its_type_and_its_position() -> None:
    seeds = {
        derive_seed("a", "b"),
        derive_seed("b", "a"),
        derive_seed("ab"),
        derive_seed("ab", ""),
        derive_seed("", "ab"),
        derive_seed(1),
        derive_seed("1"),
        derive_seed(b"1"),
    }
    assert len(seeds) == 8


def test_a_views_seed_is_pinned_and_follows_the_specification() -> None:
    def part(kind: bytes, text: str) -> bytes:
        return kind + len(text).to_bytes(8, "little") + text.encode()

    message = part(b"s", "view") + part(b"i", "7") + part(b"s", "n01440764_1") + part(b"i", "3")
    by_hand = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    assert view_seed(7, "n01440764_1", 3) == by_hand == 14094201453953614520
