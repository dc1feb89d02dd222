"""Weights of few bits with their scales, symmetric about zero, as ONNX Runtime's operators read them."""

import numpy as np

# Weights that share a scale where scales are by block.
BLOCK = 32


def per_output(weight):
    """(outputs, inputs) -> int8 (inputs, outputs) and one scale for each output, for DynamicQuantizeMatMul."""
    scale = np.abs(weight).max(axis=1) / 127
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.rint(weight * inverse[:, None]).astype(np.int8).T, scale.astype(np.float32)


def blocks(weight, bits):
    """(outputs, inputs) -> packed (outputs, blocks, bytes of a block) and scales (outputs, blocks), for MatMulNBits.

    The stored value is the quantised weight plus 2^(bits-1), which is the zero point when none is given. As in GGUF's q4_0
    the weight of largest magnitude is met exactly at 4 bits: its sign decides that of the scale.
    """
    outputs, inputs = weight.shape
    w = np.pad(weight, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    zero = 1 << (bits - 1)
    peak = np.take_along_axis(w, np.abs(w).argmax(axis=2, keepdims=True), axis=2)
    scale = np.abs(peak) / (zero - 1) if bits == 8 else peak / -zero
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    q = (np.clip(np.rint(w * inverse), -zero, zero - 1) + zero).astype(np.uint8)
    if bits == 4:
        q = q[:, :, 0::2] | (q[:, :, 1::2] << 4)
    return q, np.ascontiguousarray(scale[:, :, 0].astype(np.float32))
