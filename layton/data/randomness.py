"""Order and chance as pure functions of integers: no state to save, nothing to replay on resume.

The permutation is a Feistel network with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002), with the splitmix64 finaliser as round function: O(1) memory whatever the size of the data set.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 4


def mix(*values: int) -> int:
    """Hash integers to one of 63 bits, the same everywhere and always; small changes change everything.

    Args:
        values: Any integers; order matters.
    """
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = _finalise((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15)
    return state >> 1


def _finalise(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def permute(index: int, length: int, *, key: int) -> int:
    """Where `index` goes in the permutation of range(length) that belongs to `key`.

    Args:
        index: In [0, length).
        length: Number of things permuted.
        key: Chooses the permutation.

    Raises:
        ValueError: If the index is out of range.
    """
    if not 0 <= index < length:
        raise ValueError(f"index {index} is not in [0, {length})")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    value = index
    while True:  # the domain is less than 4 x length, so this ends after 4 rounds on average at most
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_finalise(right + key + round_number * 0xD1342543DE82EF95) & half_mask)
        value = left << half_bits | right
        if value < length:
            return value
