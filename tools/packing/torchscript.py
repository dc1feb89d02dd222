"""A decoder as a TorchScript module that writes its KV cache in place, after the contract in docs/engines.md."""

import json
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import decoder as neutral
from .stepwise import ACTIVATIONS, Linear, describe

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CACHE = "in-place"


def fixed(array):
    return nn.Parameter(torch.from_numpy(array), requires_grad=False)


class Norm(nn.Module):
    """RMSNorm or LayerNorm of the last dimension; both compute in float32, whatever the type."""

    def __init__(self, part, rms, eps):
        super().__init__()
        self.rms, self.eps, self.weight = rms, eps, fixed(part.weight)
        self.bias = None if part.bias is None else fixed(part.bias)

    def forward(self, x):
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def below(*parts):
    """Linear layers of the same input as one, their outputs one behind the other."""
    biased = any(p.bias is not None for p in parts)
    bias = [np.zeros(len(p.weight), np.float32) if p.bias is None else p.bias for p in parts]
    return neutral.Linear(np.concatenate([p.weight for p in parts]), np.concatenate(bias) if biased else None)


class Block(nn.Module):
    def __init__(self, d, block):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = d.heads, d.kv_heads, d.head_dim
        self.scale = d.attention_scale if d.attention_scale is not None else d.head_dim**-0.5
        self.activation, self.parallel, self.residual_scale = ACTIVATIONS[d.activation], d.parallel, d.residual_scale
        self.attention_norm = Norm(block.attention_norm, d.rms, d.eps)
        self.mlp_norm = None if block.mlp_norm is None else Norm(block.mlp_norm, d.rms, d.eps)
        self.qkv, self.o = Linear(below(block.q, block.k, block.v)), Linear(block.o)
        self.gated = block.gate is not None
        self.up = Linear(below(block.gate, block.up) if self.gated else block.up)
        self.down = Linear(block.down)
        self.q_norm = None if block.q_norm is None else Norm(neutral.Norm(block.q_norm), True, d.eps)
        self.k_norm = None if block.k_norm is None else Norm(neutral.Norm(block.k_norm), True, d.eps)

    def attend(self, h, turn, places, mask, keys, values):
        joined = self.qkv(h).unflatten(-1, (-1, self.head_dim))
        qk, v = joined.split([self.heads + self.kv_heads, self.kv_heads], 2)
        if self.q_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], 2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        q, k = turn(qk).transpose(1, 2).split([self.heads, self.kv_heads], 1)
        keys.scatter_(2, places, k)
        values.scatter_(2, places, v.transpose(1, 2))
        # Query heads that share a key lie one below the other: (rows, kv_heads, group x new, head).
        grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.head_dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.scale)
        return self.o(out.reshape(q.shape).transpose(1, 2).flatten(2))

    def mlp(self, x):
        up = self.up(x)
        if not self.gated:
            return self.down(self.activation(up))
        gate, up = up.chunk(2, -1)
        return self.down(self.activation(gate) * up)

    def forward(self, x, turn, places, mask, keys, values):
        h = self.attention_norm(x)
        attended = self.attend(h, turn, places, mask, keys, values)
        if self.parallel:
            m = h if self.mlp_norm is None else self.mlp_norm(x)
            return torch.add(torch.add(x, attended, alpha=self.residual_scale), self.mlp(m), alpha=self.residual_scale)
        x = torch.add(x, attended, alpha=self.residual_scale)
        return torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.residual_scale)


class Step(nn.Module):
    """ids (rows, new), lengths (rows): tokens that each row holds; then key and value (rows, kv_heads, total, head) of each layer.

    Writes what is new behind each row's tokens, and gives the logits (rows, vocabulary) after each row's last token.
    `total` is at least what the longest row holds with the new tokens.
    """

    def __init__(self, d):
        super().__init__()
        self.embedding_scale, self.logits_scale = d.embedding_scale, d.logits_scale
        self.kv_heads, self.head_dim, self.group = d.kv_heads, d.head_dim, d.heads // d.kv_heads
        self.half = 0 if d.cos is None else d.cos.shape[1]
        self.embedding = fixed(d.embedding)
        self.positions = None if d.positions is None else fixed(d.positions)
        self.output = Linear(d.output, self.embedding if d.tied else None)
        self.blocks = nn.ModuleList(Block(d, b) for b in d.blocks)
        self.final_norm = Norm(d.final_norm, d.rms, d.eps)
        self.embedding_norm = None if d.embedding_norm is None else Norm(d.embedding_norm, d.rms, d.eps)
        # Computed from the configuration. A tensor that a trace makes stays on the device on which it was traced; these move.
        cos, sin = rotary_tables(d)
        slopes = None if d.alibi is None else d.alibi.reshape(1, -1, 1, 1)
        for name, table in (("cos", cos), ("sin", sin), ("slopes", slopes), ("counted", np.arange(d.max_positions))):
            self.register_buffer(name, None if table is None else torch.from_numpy(table))

    def forward(self, ids, lengths, *cache):
        places = lengths[:, None] + self.counted[: ids.shape[1]]
        x = F.embedding(ids, self.embedding)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.positions is not None:
            x = x + F.embedding(places, self.positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        mask = self.mask(places, self.counted[: cache[0].shape[2]], x.dtype)
        turn = self.turn(places)
        written = places[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
        for block, keys, values in zip(self.blocks, cache[0::2], cache[1::2]):
            x = block(x, turn, written, mask, keys, values)
        return (self.output(self.final_norm(x[:, -1])) * self.logits_scale).float()

    def mask(self, places, held, dtype):
        """What is added to scores: (rows, kv_heads or 1, group x new, total), as attention has its queries."""
        ahead = held - places[:, None, :, None]
        mask, heads = torch.where(ahead > 0, float("-inf"), 0.0), 1
        if self.slopes is not None:
            mask, heads = mask + self.slopes.float() * ahead, self.kv_heads
        mask = mask.to(dtype)
        return mask.expand(-1, heads * self.group, -1, -1).reshape(mask.shape[0], heads, -1, mask.shape[3])

    def turn(self, places):
        """Rotary positions of a part of each head, its pairs half of that part apart."""
        if self.cos is None:
            return lambda x: x
        cos, sin = (F.embedding(places, table)[:, :, None] for table in (self.cos, self.sin))
        half = self.half

        def turned(x):
            other = torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], -1)
            return torch.addcmul(x * cos, other, sin)

        return turned


def rotary_tables(d):
    """What each value of a head is multiplied by, and its partner in the turn: (max_positions, head_dim) each."""
    if d.cos is None:
        return None, None
    rest = (len(d.cos), d.head_dim - 2 * d.cos.shape[1])
    cos = np.concatenate([d.cos, d.cos, np.ones(rest, np.float32)], 1)
    return cos, np.concatenate([-d.sin, d.sin, np.zeros(rest, np.float32)], 1)


def write(d, dtype, directory):
    """Writes model.pt and joulecast.json. Weights, activations and cache are of one type; norms and softmax compute in float32."""
    step = Step(d).eval().to(DTYPES[dtype])
    if d.tied:
        step.output.weight = step.embedding  # conversion has made two of it
    # Inputs of different sizes, so that no size is taken for a constant.
    cache = [torch.zeros(2, d.kv_heads, 8, d.head_dim, dtype=DTYPES[dtype]) for _ in range(2 * len(d.blocks))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is old, and says so
        traced = torch.jit.trace(step, (torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.tensor([4, 5]), *cache), check_trace=False)
        torch.jit.save(traced, directory / "model.pt")
    looked_up = sum(a.size for a in (None if d.tied else d.embedding, d.positions) if a is not None)
    step_weight_bytes = (d.parameters - looked_up) * DTYPES[dtype].itemsize
    (directory / "joulecast.json").write_text(json.dumps(describe(d, CACHE, dtype, step_weight_bytes), indent=1) + "\n")


class TorchScriptModel:
    """An artifact with its cache; `step` appends one piece to every row, or to those that are named."""

    def __init__(self, directory, d, dtype, rows, length):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.module = torch.jit.load(directory / "model.pt")
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.cache = [torch.zeros(rows, d.kv_heads, length, d.head_dim, dtype=DTYPES[dtype]) for _ in range(2 * len(d.blocks))]

    @torch.no_grad()
    def step(self, ids, rows=slice(None)):
        """Logits (rows, vocabulary) after the last of ids (rows, tokens)."""
        ids = torch.as_tensor(np.asarray(ids, np.int64))
        lengths = self.lengths[rows]
        total = int(lengths.max()) + ids.shape[1]
        logits = self.module(ids, lengths, *(part[rows, :, :total] for part in self.cache))
        self.lengths[rows] = lengths + ids.shape[1]
        return logits.numpy()
