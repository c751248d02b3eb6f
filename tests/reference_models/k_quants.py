"""Q4_K and Q6_K, which the ``gguf`` package reads and does not write: simple quantisers into the same blocks.

Nearest levels between the extremes of each block; llama.cpp searches for better ones, the layout is the same.
The formats: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (block_q4_K, block_q6_K).
"""

import gguf
import numpy as np

SUPER_BLOCK = 256
Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K


def quantize(weights: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows as blocks of bytes, of any type that these or the package can write."""
    if kind not in (Q4_K, Q6_K):
        return gguf.quantize(np.ascontiguousarray(weights), kind)
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, SUPER_BLOCK)
    packed = _q4_k(blocks) if kind == Q4_K else _q6_k(blocks)
    return packed.reshape(*weights.shape[:-1], -1)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)


def _ratio(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Whole numbers of ``unit`` nearest to ``values``; 0 where the unit is 0."""
    return np.rint(np.divide(values, unit, out=np.zeros_like(values), where=unit != 0))


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """d, dmin, eight 6-bit scales and minima in 12 bytes, 256 4-bit levels: x = d scale level - dmin minimum."""
    parts = blocks.reshape(-1, 8, 32)
    lowest = np.maximum(-parts.min(axis=2), 0)
    step = (parts.max(axis=2) + lowest) / 15
    d, dmin = (_half(x.max(axis=1, keepdims=True) / 63) for x in (step, lowest))
    scale = np.clip(_ratio(step, d.astype(np.float32)), 0, 63)
    minimum = np.clip(_ratio(lowest, dmin.astype(np.float32)), 0, 63)
    unit = (d * scale).astype(np.float32)[..., None]
    level = np.clip(_ratio(parts + (dmin * minimum).astype(np.float32)[..., None], unit), 0, 15).astype(np.uint8)
    scale, minimum = scale.astype(np.uint8), minimum.astype(np.uint8)
    # The first four of each in the low 6 bits, the last four split: low nibbles together, high pairs above the first.
    scales = np.concatenate(
        [
            scale[:, :4] | (scale[:, 4:] >> 4) << 6,
            minimum[:, :4] | (minimum[:, 4:] >> 4) << 6,
            (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4,
        ],
        axis=1,
    )
    pairs = level.reshape(-1, 4, 2, 32)
    levels = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), scales, levels], axis=1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 6-bit levels (low nibbles, then high pairs), sixteen signed scales, d: x = d scale (level - 32)."""
    parts = blocks.reshape(-1, 16, 16)
    step = np.abs(parts).max(axis=2) / 31
    d = _half(step.max(axis=1, keepdims=True) / 127)
    scale = np.clip(_ratio(step, d.astype(np.float32)), 1, 127).astype(np.int8)
    unit = d.astype(np.float32) * scale
    level = (np.clip(_ratio(parts, unit[..., None]), -32, 31) + 32).astype(np.uint8)
    quarters = level.reshape(-1, 2, 4, 32)
    low = np.stack(
        [quarters[:, :, 0] & 15 | quarters[:, :, 2] << 4, quarters[:, :, 1] & 15 | quarters[:, :, 3] << 4], 2
    )
    high = sum((quarters[:, :, i] >> 4) << 2 * i for i in range(4)).astype(np.uint8)
    return np.concatenate(
        [low.astype(np.uint8).reshape(-1, 128), high.reshape(-1, 64), scale.view(np.uint8), d.view(np.uint8)], axis=1
    )
