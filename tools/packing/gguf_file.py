"""A decoder as a GGUF file, with the names, metadata and order of rows that llama.cpp defines."""

import gguf
import numpy as np

from . import q4k
from .decoder import NotPacked

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_K": gguf.GGMLQuantizationType.Q4_K,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_S,
}
BLOCKS = {"q8_0": 32, "q4_0": 32, "q4_K": q4k.BLOCK}


def interleaved(part, heads):
    """Llama's rotary pairs lie half a head apart in Hugging Face's files and beside each other in GGUF."""
    swap = lambda a: a.reshape(heads, 2, a.shape[0] // heads // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)
    return swap(part.weight), None if part.bias is None else swap(part.bias)


def write(decoder, config, dtype, path):
    """Writes the file. Norms, biases and position tables are f32, every matrix is `dtype`; the output layer and embedding too,
    but that they are q8_0 with q4_K, since the output layer decides between tokens that lie close."""
    if decoder.family not in ("llama", "qwen2"):
        raise NotPacked(f"gguf: {decoder.family!r} is not written; llama and qwen2 are")
    w = gguf.GGUFWriter(path, decoder.family)
    w.add_file_type(FILE_TYPES[dtype])
    w.add_context_length(decoder.max_positions)
    w.add_embedding_length(decoder.hidden)
    w.add_block_count(len(decoder.blocks))
    w.add_feed_forward_length(decoder.blocks[0].up.weight.shape[0])
    w.add_head_count(decoder.heads)
    w.add_head_count_kv(decoder.kv_heads)
    w.add_key_length(decoder.head_dim)
    w.add_value_length(decoder.head_dim)
    w.add_layer_norm_rms_eps(decoder.eps)
    w.add_rope_dimension_count(decoder.head_dim)
    w.add_vocab_size(decoder.vocab)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    w.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "llama3":
        half = decoder.head_dim // 2
        plain = np.float64(rope["rope_theta"]) ** (-np.arange(half) / half)
        w.add_tensor("rope_freqs.weight", (plain / frequencies(plain, rope)).astype(np.float32))
    elif kind != "default":
        raise NotPacked(f"config.json: rope_type {kind!r} has no form in GGUF here; default, linear and llama3 have")

    def matrix(name, weight):
        own = "q8_0" if dtype == "q4_K" and name in ("token_embd.weight", "output.weight") else dtype
        block = BLOCKS.get(own, 1)
        if weight.shape[1] % block:
            raise NotPacked(f"{name}: rows of {weight.shape[1]} weights cannot be cut into blocks of {block}; pack another type")
        weight, kind = np.ascontiguousarray(weight), TYPES[own]
        packed = q4k.quantize(weight) if own == "q4_K" else gguf.quants.quantize(weight, kind)
        w.add_tensor(name, packed, raw_dtype=kind)

    def vector(name, values):
        if values is not None:
            w.add_tensor(name, values.astype(np.float32))

    def linear(name, part):
        matrix(f"{name}.weight", part.weight)
        vector(f"{name}.bias", part.bias)

    matrix("token_embd.weight", decoder.embedding)
    if not decoder.tied:
        matrix("output.weight", decoder.output.weight)
    vector("output_norm.weight", decoder.final_norm.weight)
    for i, b in enumerate(decoder.blocks):
        at = f"blk.{i}"
        vector(f"{at}.attn_norm.weight", b.attention_norm.weight)
        vector(f"{at}.ffn_norm.weight", b.mlp_norm.weight)
        for name, part, heads in (("q", b.q, decoder.heads), ("k", b.k, decoder.kv_heads)):
            weight, bias = interleaved(part, heads) if decoder.family == "llama" else (part.weight, part.bias)
            matrix(f"{at}.attn_{name}.weight", weight)
            vector(f"{at}.attn_{name}.bias", bias)
        for name, part in (("attn_v", b.v), ("attn_output", b.o), ("ffn_gate", b.gate), ("ffn_up", b.up), ("ffn_down", b.down)):
            linear(f"{at}.{name}", part)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def frequencies(plain, rope):
    """Llama 3's scaled frequencies, as transformers defines them."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    wavelength = 2 * np.pi / plain
    ramp = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"])
    between = (1 - ramp) * plain / rope["factor"] + ramp * plain
    return np.where(wavelength < high, plain, np.where(wavelength > low, plain / rope["factor"], between))
