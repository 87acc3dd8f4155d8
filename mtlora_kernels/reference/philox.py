"""Philox 4x32-10 (Salmon et al., SC 2011) in integer torch operations.

Counter-based: word ``feature % 4`` of the block with counter (feature // 4, token, 0, 0) and key ``seed``
belongs to (token, feature), so a mask is recomputed anywhere from the seed and never stored.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox_words(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Ten rounds on four 32-bit counter words held in int64 tensors; seed is an int64 tensor."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps modulo 2**64, which keeps all 64 bits
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def keep_mask(seed: Tensor, tokens: int, features: int, dropout_p: float) -> Tensor:
    """bool [tokens, features]: True where the element is kept; seed is int64 [1] on the wanted device."""
    token = torch.arange(tokens, device=seed.device)[:, None]
    block = torch.arange(-(-features // 4), device=seed.device)[None, :]
    zero = torch.zeros_like(token * block)
    words = philox_words([block + zero, token + zero, zero, zero], seed)
    uniform = torch.stack(words, -1).flatten(1)[:, :features]
    return uniform >= int(dropout_p * 2**32)
