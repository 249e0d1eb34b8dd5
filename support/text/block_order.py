"""The order of blocks when there are too many to store it: a permutation that is computed."""

from functools import lru_cache

import numpy as np


@lru_cache
def _round_keys(key: tuple[int, ...]) -> list[int]:
    return [int(k) for k in np.random.SeedSequence(key).generate_state(6, np.uint64)]


def permuted(position: int, n: int, key: tuple[int, ...]) -> int:
    """Where the permutation of 0 ... n - 1 that `key` names takes `position`: computed, where a stored order
    would fill the memory.

    A Feistel network of six rounds permutes all numbers of an even number of bits; whoever lands at n or
    beyond walks on (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = (n.bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for k in _round_keys(key):
            mixed = (right ^ k) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            left, right = right, left ^ (mixed >> 32 ^ mixed >> 11) & mask
        position = left << half | right
        if position < n:
            return position
