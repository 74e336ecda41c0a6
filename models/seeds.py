"""Randomness is derived, never carried: every seed is a function of what it is for."""

import hashlib


def derive(*purpose: str | int) -> int:
    """A seed in [0, 2^63) for a purpose, e.g. `derive("step", seed, 17)`. Near purposes give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
