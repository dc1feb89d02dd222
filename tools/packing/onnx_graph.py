"""A decoder as an ONNX graph with a KV cache, after the contract in docs/engines.md.

Attention is ONNX Runtime's GroupQueryAttention: given the same memory for past and present it appends in place, and
each sequence of a batch has a length of its own. Only the last position's logits are computed.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .decoder import Linear, NotPacked
from .quantize import BLOCK, blocks, per_output

MICROSOFT = "com.microsoft"
CACHE = "in-place"


class Graph:
    """Collects nodes and weights; every method returns the name of its output."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.nodes, self.weights, self.count = [], {}, 0

    def weight(self, name, value):
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(self, kind, inputs, outputs=1, domain="", name=None, **attributes):
        self.count += 1
        name = name or f"{kind}_{self.count}"
        names = [f"{name}_out{i}" if outputs > 1 else f"{name}_out" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, value, dtype=np.int64):
        value = np.asarray(value, dtype=dtype)
        text = "_".join(str(v) for v in value.ravel()) or "empty"
        return self.weight(f"constant_{value.dtype}_{value.ndim}_{text}", value)

    def scale(self, x, factor):
        return x if factor == 1.0 else self.node("Mul", [x, self.constant(factor, np.float32)])

    def linear(self, x, part, name):
        """x times the transposed weights, plus the bias."""
        outputs, inputs = part.weight.shape
        if self.dtype == "int4":
            # the output layer decides between tokens that lie close: 8 bits, as llama.cpp spends more on it too
            bits = 8 if name == "output" else 4
            packed, scales = blocks(part.weight, bits)
            y = self.node("MatMulNBits", [x, self.weight(f"{name}.weight", packed), self.weight(f"{name}.scales", scales)],
                          domain=MICROSOFT, name=name, K=inputs, N=outputs, bits=bits, block_size=BLOCK, accuracy_level=4)
        elif self.dtype == "int8":
            columns, scales = per_output(part.weight)
            y = self.node("DynamicQuantizeMatMul", [x, self.weight(f"{name}.weight", columns), self.weight(f"{name}.scales", scales)],
                          domain=MICROSOFT, name=name)
        else:
            y = self.node("MatMul", [x, self.weight(f"{name}.weight", part.weight.T)], name=name)
        return y if part.bias is None else self.node("Add", [y, self.weight(f"{name}.bias", part.bias)])

    def norm(self, x, part, decoder, name, skip=None):
        """The norm of x, or of x + skip; with skip also that sum."""
        kind = "SimplifiedLayerNormalization" if decoder.rms else "LayerNormalization"
        weights = [self.weight(f"{name}.weight", part.weight)]
        if not decoder.rms:
            bias = part.bias if part.bias is not None else np.zeros_like(part.weight)
            weights.append(self.weight(f"{name}.bias", bias))
        if skip is None:
            return self.node(kind, [x, *weights], name=name, epsilon=decoder.eps, axis=-1)
        out = self.node("Skip" + kind, [x, skip, *weights], outputs=4, domain=MICROSOFT, name=name, epsilon=decoder.eps)
        # the two in between are for training
        self.nodes[-1].output[1] = self.nodes[-1].output[2] = ""
        return out[0], out[3]

    def activate(self, x, kind):
        if kind == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        if kind == "relu":
            return self.node("Relu", [x])
        if kind == "gelu":
            return self.node("Gelu", [x], domain=MICROSOFT)
        return self.node("FastGelu", [x], domain=MICROSOFT)


def joined(*parts):
    """Several products of the same input as one."""
    bias = None
    if any(p.bias is not None for p in parts):
        bias = np.concatenate([p.bias if p.bias is not None else np.zeros(len(p.weight), np.float32) for p in parts])
    return Linear(np.concatenate([p.weight for p in parts]), bias)


def build(decoder, dtype):
    """The model; `dtype` is f32, or a quantised type of which activations and cache stay f32."""
    g = Graph(dtype)
    d = decoder
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
              helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, d.vocab])]
    inside = d.cos is not None and 2 * d.cos.shape[1] == d.head_dim and d.head_dim % 16 == 0
    positions = None
    if d.positions is not None or (d.cos is not None and not inside):
        inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]))
        positions = "position_ids"

    counted = g.node("ReduceSum", ["attention_mask", g.constant([1])], keepdims=0)
    lengths = g.node("Cast", [g.node("Sub", [counted, g.constant(1)])], to=TensorProto.INT32)
    total = g.node("Gather", [g.node("Shape", ["attention_mask"]), g.constant(1)])
    total = g.node("Cast", [total], to=TensorProto.INT32)
    if d.head_dim % 8:
        raise NotPacked(f"heads of {d.head_dim} values: ONNX Runtime's GroupQueryAttention takes multiples of 8; use the candle engine")
    cos = sin = ""
    if d.cos is not None:
        cos, sin = g.weight("rotary.cos", d.cos), g.weight("rotary.sin", d.sin)
    bias = ""
    if d.alibi is not None:
        # Slope times the key's position: a query's own part is the same for all its keys, and softmax takes it out.
        end = g.node("Cast", [g.node("Gather", [g.node("Shape", ["attention_mask"]), g.constant(1)])], to=TensorProto.FLOAT)
        keys = g.node("Range", [g.constant(0, np.float32), end, g.constant(1, np.float32)])
        slopes = g.weight("alibi.slopes", d.alibi.reshape(1, -1, 1, 1))
        wide = g.node("Mul", [slopes, keys])
        shape = g.node("Concat", [g.constant([1, d.heads]), g.node("Shape", ["input_ids"], start=1), g.constant([1])], axis=0)
        bias = g.node("Expand", [wide, shape])

    x = embedding(g, d)
    x = g.scale(x, d.embedding_scale)
    if d.positions is not None:
        x = g.node("Add", [x, g.node("Gather", [g.weight("positions.weight", d.positions), positions])])
    if d.embedding_norm is not None:
        x = g.norm(x, d.embedding_norm, d, "embedding_norm")

    skip = None  # what is still to be added to x
    for i, block in enumerate(d.blocks):
        at = f"layers.{i}"
        if skip is None:
            h = g.norm(x, block.attention_norm, d, f"{at}.attention_norm")
        else:
            h, x = g.norm(x, block.attention_norm, d, f"{at}.attention_norm", skip)
        a, cache_in, cache_out = attention(g, d, block, i, h, positions, lengths, total, (cos, sin), bias, inside)
        inputs += cache_in
        outputs += cache_out
        a = g.scale(a, d.residual_scale)
        if d.parallel:
            m = h if block.mlp_norm is None else g.norm(x, block.mlp_norm, d, f"{at}.mlp_norm")
            skip = g.node("Add", [a, g.scale(mlp(g, d, block, at, m), d.residual_scale)])
        else:
            m, x = g.norm(x, block.mlp_norm, d, f"{at}.mlp_norm", a)
            skip = g.scale(mlp(g, d, block, at, m), d.residual_scale)
    h, _ = g.norm(x, d.final_norm, d, "final_norm", skip)
    last = g.node("Slice", [h, g.constant([-1]), g.constant([np.iinfo(np.int64).max]), g.constant([1])])
    logits = g.scale(g.linear(last, d.output, "output"), d.logits_scale)
    g.nodes.append(helper.make_node("Identity", [logits], ["logits"]))

    graph = helper.make_graph(g.nodes, d.family, inputs, outputs, list(g.weights.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)],
                              ir_version=10, producer_name="joulecast-modelpack")
    helper.set_model_props(model, {
        "joulecast.kv_cache": CACHE, "joulecast.architecture": d.family, "joulecast.dtype": dtype,
        "joulecast.parameters": str(d.parameters), "joulecast.max_positions": str(d.max_positions),
        **{f"joulecast.{key}": str(value) for key, value in work(g, d).items()}})
    return model


def work(g, d):
    """What one step costs: bytes of the weights that it reads, and operations (a multiply-add is two)."""
    matrices = [part.weight.size for b in d.blocks for part in (b.q, b.k, b.v, b.o, b.up, b.down, b.gate) if part is not None]
    looked_up = {"embedding.weight", "embedding.scales", "positions.weight", "rotary.cos", "rotary.sin"}
    return {
        "step_weight_bytes": sum(len(w.raw_data) for name, w in g.weights.items() if name not in looked_up),
        "block_flops_per_token": 2 * sum(matrices), "output_flops_per_row": 2 * d.output.weight.size,
        "attention_flops_per_position": 4 * len(d.blocks) * d.heads * d.head_dim,
    }


def embedding(g, d):
    """Rows of the embedding; quantised with the rest, of 8 bits at least."""
    if g.dtype == "f32":
        return g.node("Gather", [g.weight("embedding.weight", d.embedding), "input_ids"], name="embedding")
    packed, scales = blocks(d.embedding, 8)
    packed = g.weight("embedding.weight", packed.reshape(d.vocab, -1))
    return g.node("GatherBlockQuantized", [packed, "input_ids", g.weight("embedding.scales", scales)], domain=MICROSOFT,
                  name="embedding", bits=8, block_size=BLOCK, gather_axis=0, quantize_axis=1)


def attention(g, d, block, i, h, positions, lengths, total, tables, bias, inside):
    at = f"layers.{i}"
    q_width, kv_width = d.heads * d.head_dim, d.kv_heads * d.head_dim
    qkv = g.linear(h, joined(block.q, block.k, block.v), f"{at}.qkv")
    query, key, value = qkv, "", ""
    outside = d.cos is not None and not inside
    if outside or block.q_norm is not None:
        query, key, value = g.node("Split", [qkv, g.constant([q_width, kv_width, kv_width])], outputs=3, axis=-1)
    if block.q_norm is not None:
        query = normed_heads(g, d, query, block.q_norm, d.heads, f"{at}.q_norm")
        key = normed_heads(g, d, key, block.k_norm, d.kv_heads, f"{at}.k_norm")
    if outside:
        turn = dict(domain=MICROSOFT, rotary_embedding_dim=2 * d.cos.shape[1])
        query = g.node("RotaryEmbedding", [query, positions, *tables], num_heads=d.heads, **turn)
        key = g.node("RotaryEmbedding", [key, positions, *tables], num_heads=d.kv_heads, **turn)
    inner = tables if inside else ("", "")
    attributes = {}
    if d.attention_scale is not None:
        attributes["scale"] = d.attention_scale
    shape = ["batch", d.kv_heads, "cache", d.head_dim]
    names = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
    given = [query, key, value, *names, lengths, total, *inner, "", bias]
    while given[-1] == "":
        given.pop()
    out = g.node("GroupQueryAttention", given, outputs=3, domain=MICROSOFT, name=f"{at}.attention",
                 num_heads=d.heads, kv_num_heads=d.kv_heads, do_rotary=int(inside), **attributes)
    presents = [f"present.{i}.{part}" for part in ("key", "value")]
    g.nodes[-1].output[1], g.nodes[-1].output[2] = presents
    kind = TensorProto.FLOAT
    return (g.linear(out[0], block.o, f"{at}.o"),
            [helper.make_tensor_value_info(n, kind, shape) for n in names],
            [helper.make_tensor_value_info(n, kind, shape) for n in presents])


def normed_heads(g, d, x, weight, heads, name):
    """RMSNorm of each head; GroupQueryAttention's own is not implemented on the CPU."""
    apart = g.node("Reshape", [x, g.constant([0, 0, heads, d.head_dim])])
    apart = g.node("SimplifiedLayerNormalization", [apart, g.weight(f"{name}.weight", weight)], name=name, epsilon=d.eps, axis=-1)
    return g.node("Reshape", [apart, g.constant([0, 0, heads * d.head_dim])])


def mlp(g, d, block, at, h):
    up = g.linear(h, block.up, f"{at}.up")
    if block.gate is None:
        return g.linear(g.activate(up, d.activation), block.down, f"{at}.down")
    gate = g.activate(g.linear(h, block.gate, f"{at}.gate"), d.activation)
    return g.linear(g.node("Mul", [gate, up]), block.down, f"{at}.down")


def save(model, path, external):
    """Writes the file, with its weights beside it where `external` (a file name) is given."""
    if external is None:
        onnx.save(model, path)
        return
    onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=1024)
    # onnx makes it for its owner alone; a pod runs as somebody else
    (Path(path).parent / external).chmod(0o644)
