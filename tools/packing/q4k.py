"""GGUF's q4_K: 256 neighbouring weights share two binary16 factors, each 32 of them a scale and a minimum of 6 bits."""

import numpy as np

BLOCK, PART = 256, 32


def quantize(weight):
    """(outputs, inputs) float32, inputs a multiple of 256 -> (outputs, bytes) as the file has them.

    A weight is scale x (0 to 15) - minimum. Each part's range, zero included, is cut into 15 steps; then, the whole numbers
    fixed, scale and minimum are fitted to the weights by least squares, and both are rounded to 6 bits.
    """
    outputs, inputs = weight.shape
    w = weight.astype(np.float32).reshape(-1, BLOCK // PART, PART)
    low = np.minimum(w.min(2), 0)
    scale, least = (w.max(2).clip(0) - low) / 15, -low
    for _ in range(3):
        q = numbers(w, scale, least)
        # w = scale q - least: the line through the part's points
        mean_q, mean_w = q.mean(2), w.mean(2)
        spread = (q * q).mean(2) - mean_q**2
        slope = divided((q * w).mean(2) - mean_q * mean_w, spread)
        shift = slope * mean_q - mean_w
        good = (spread > 0) & (slope > 0) & (shift >= 0)
        scale, least = np.where(good, slope, scale), np.where(good, shift, least)
    d, d_least = (np.float16(part.max(1) / 63).astype(np.float32) for part in (scale, least))
    s, m = (np.rint(divided(part, factor[:, None])).clip(0, 63).astype(np.uint8) for part, factor in ((scale, d), (least, d_least)))
    q = numbers(w, d[:, None] * s, d_least[:, None] * m).astype(np.uint8)

    packed = np.zeros((len(w), 144), np.uint8)
    packed[:, 0:2], packed[:, 2:4] = (np.float16(part)[:, None].view(np.uint8) for part in (d, d_least))
    packed[:, 4:8] = s[:, :4] | (s[:, 4:] >> 4) << 6
    packed[:, 8:12] = m[:, :4] | (m[:, 4:] >> 4) << 6
    packed[:, 12:16] = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    packed[:, 16:] = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(w), -1)
    return packed.reshape(outputs, -1)


def numbers(w, scale, least):
    return np.rint(divided(w + least[:, :, None], scale[:, :, None])).clip(0, 15)


def divided(a, b):
    return np.divide(a, b, out=np.zeros_like(a, dtype=np.float32), where=b != 0)
