"""Which sequences make up a step: a pure function, so that resuming needs the step alone.

The order of an epoch is a keyed permutation computed value by value, never stored: a Feistel
network is a bijection of a power of four, and walking its cycles makes it one of range(n)
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import hashlib

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 6


def shuffled(position: npt.ArrayLike, n: int, key: int) -> Indices:
    """Where the permutation of range(n) that ``key`` chooses takes each position; same shape.

    Positions lie in [0, n). Constant memory; on average below four passes of the network.
    """
    half_bits = max(1, (n - 1).bit_length() + 1 >> 1)
    keys = round_keys(key)
    found = np.asarray(position, dtype=np.uint64).ravel()
    found = feistel(found, half_bits, keys)
    outside = np.flatnonzero(found >= n)
    while outside.size:  # the cycle that a position lies on comes back below n
        found[outside] = feistel(found[outside], half_bits, keys)
        outside = outside[found[outside] >= n]
    return found.astype(np.int64).reshape(np.shape(position))


def feistel(value: Words, half_bits: int, keys: Words) -> Words:
    """A bijection of the numbers of ``2 * half_bits`` bits."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    joined: Words = (left << shift) | right
    return joined


def mix(value: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = value ^ (value >> np.uint64(31))
    return mixed


def round_keys(key: int) -> Words:
    hashed = hashlib.sha512(str(key).encode()).digest()
    return np.frombuffer(hashed, dtype="<u8")[:ROUNDS].astype(np.uint64)


def epoch_key(seed: int, epoch: int | str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big")


def step_sequences(seed: int, step: int, global_batch: int, num_sequences: int) -> Indices:
    """The sequences of step ``step`` (from 0), shape [global_batch], on however many ranks.

    Every epoch visits each of ``num_sequences`` once, in an order of its own; a step may span two.
    """
    positions = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epochs, within = np.divmod(positions, num_sequences)
    sequences = np.empty(global_batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        key = epoch_key(seed, int(epoch))
        sequences[chosen] = shuffled(within[chosen], num_sequences, key)
    return sequences


def own_order(seed: int, source: int, draws: Indices, num_sequences: int) -> Indices:
    """Which of its sequences a source of a mixture gives at these of its draws; same shape."""
    epochs, within = np.divmod(draws, num_sequences)
    sequences = np.empty_like(draws)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        key = epoch_key(seed, f"{epoch}/{source}")
        sequences[chosen] = shuffled(within[chosen], num_sequences, key)
    return sequences


def rank_share(indices: Indices, rank: int, world_size: int, micro_batch: int) -> Indices:
    """One rank's part of a step, shape [num_micro, micro_batch]; the ranks' parts make it whole.

    The global batch is a multiple of ``world_size * micro_batch``, as the plan has it.
    """
    assert len(indices) % (world_size * micro_batch) == 0
    return indices.reshape(-1, world_size, micro_batch)[:, rank]
