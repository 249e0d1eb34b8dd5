"""The order in which blocks are trained on. Each epoch visits every block once, in a new random order (a
permutation) that is drawn from the seed."""

from functools import lru_cache

import numpy as np

MOST_BLOCKS_STORED = 2**22  # with more blocks, the order is not stored (it takes memory) but computed


class BlockOrder:
    """Tells which block each training sample is. Samples are counted through all epochs: 0, 1, ..."""

    def __init__(self, n_blocks: int, seed: int, shuffle: bool):
        self.n_blocks, self.seed, self.shuffle = n_blocks, seed, shuffle
        self.epoch: int | None = None  # the epoch whose permutation is kept
        self.permutation: np.ndarray | None = None

    def block_of(self, sample: int) -> int:
        epoch, position = divmod(sample, self.n_blocks)
        if not self.shuffle:
            return position
        if self.n_blocks > MOST_BLOCKS_STORED:
            return permuted(position, self.n_blocks, (self.seed, epoch))
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = np.random.default_rng((self.seed, epoch)).permutation(self.n_blocks)
        return int(self.permutation[position])


def permuted(position: int, n: int, key: tuple[int, ...]) -> int:
    """Where `position` goes in a random-looking permutation of 0 ... n - 1, computed without a list of all
    numbers. Each `key` gives another permutation.

    `shuffle_bits` permutes all numbers below a power of four that is at least n. If its result is n or more,
    it is applied again, until the result is below n. This still gives each number below n exactly once
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = (n.bit_length() + 1) // 2
    while True:
        position = shuffle_bits(position, half, key)
        if position < n:
            return position


def shuffle_bits(number: int, half: int, key: tuple[int, ...]) -> int:
    """A permutation of the numbers of 2 * `half` bits, as a Feistel network (a construction from ciphers).

    Each round mixes one half of the bits into a random-looking number and changes the other half with it
    (`^`, exclusive or). Every round can be undone, so no two numbers get the same result.
    """
    mask = (1 << half) - 1
    left, right = number >> half, number & mask
    for round_key in round_keys(key):
        mixed = ((right ^ round_key) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        left, right = right, left ^ ((mixed >> 32) ^ (mixed >> 11)) & mask
    return left << half | right


@lru_cache
def round_keys(key: tuple[int, ...]) -> list[int]:
    """Six random numbers drawn from the key, one for each round."""
    return [int(number) for number in np.random.SeedSequence(key).generate_state(6, np.uint64)]
