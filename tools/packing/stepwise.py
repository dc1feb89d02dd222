"""A decoder as a torch module that takes the KV cache and gives what is new of it, after the contract in docs/engines.md.

The cache is only read: the module's attention looks at it and at the new tokens side by side, so that whoever owns the cache
appends a few values to it after each step, and no step copies the rest. OpenVINO IR is made of it.
"""

import torch
from torch import nn
from torch.nn import functional as F

CACHE = "appended"


class Linear(nn.Module):
    def __init__(self, part, weight=None):
        super().__init__()
        # a tied output layer shares the embedding's tensor
        self.weight = nn.Parameter(torch.from_numpy(part.weight) if weight is None else weight, requires_grad=False)
        self.bias = None if part.bias is None else nn.Parameter(torch.from_numpy(part.bias), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    def __init__(self, part, rms, eps):
        super().__init__()
        self.rms, self.eps = rms, eps
        self.weight = nn.Parameter(torch.from_numpy(part.weight), requires_grad=False)
        self.bias = None if part.bias is None else nn.Parameter(torch.from_numpy(part.bias), requires_grad=False)

    def forward(self, x):
        if not self.rms:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class HeadNorm(nn.Module):
    """RMSNorm of each head, as in Qwen3."""

    def __init__(self, weight, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.from_numpy(weight), requires_grad=False)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Block(nn.Module):
    def __init__(self, d, block):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = d.heads, d.kv_heads, d.head_dim
        self.scale = d.attention_scale if d.attention_scale is not None else d.head_dim**-0.5
        self.activation, self.parallel, self.residual_scale = ACTIVATIONS[d.activation], d.parallel, d.residual_scale
        self.attention_norm = Norm(block.attention_norm, d.rms, d.eps)
        self.mlp_norm = None if block.mlp_norm is None else Norm(block.mlp_norm, d.rms, d.eps)
        self.q, self.k, self.v, self.o = (Linear(p) for p in (block.q, block.k, block.v, block.o))
        self.up, self.down = Linear(block.up), Linear(block.down)
        self.gate = None if block.gate is None else Linear(block.gate)
        self.q_norm = None if block.q_norm is None else HeadNorm(block.q_norm, d.eps)
        self.k_norm = None if block.k_norm is None else HeadNorm(block.k_norm, d.eps)

    def apart(self, x, heads, norm):
        x = x.unflatten(-1, (heads, self.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def mlp(self, x):
        up = self.up(x)
        return self.down(self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up)

    def forward(self, x, turn, old_mask, new_mask, past_key, past_value):
        h = self.attention_norm(x)
        q = turn(self.apart(self.q(h), self.heads, self.q_norm)) * self.scale
        key = turn(self.apart(self.k(h), self.kv_heads, self.k_norm))
        value = self.apart(self.v(h), self.kv_heads, None)
        # Query heads that share a key lie one below the other: (rows, kv_heads, group x new, head).
        group = self.heads // self.kv_heads
        grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.head_dim)
        old = grouped @ past_key.transpose(-1, -2) + old_mask
        new = grouped @ key.transpose(-1, -2)
        new = new.unflatten(2, (group, -1)) + new_mask
        weights = torch.cat([old, new.flatten(2, 3)], -1).softmax(-1)
        length = past_key.shape[2]
        out = weights[..., :length] @ past_value + weights[..., length:] @ value
        out = out.reshape(q.shape[0], self.heads, -1, self.head_dim).transpose(1, 2).flatten(2)
        attended = self.o(out) * self.residual_scale
        if self.parallel:
            m = h if self.mlp_norm is None else self.mlp_norm(x)
            return x + attended + self.mlp(m) * self.residual_scale, key, value
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)) * self.residual_scale, key, value


class Step(nn.Module):
    """ids (rows, new), lengths (rows): tokens that each row holds; then key and value (rows, kv_heads, cache, head) of each layer.

    Gives the logits (rows, vocabulary) after each row's last token, then key and value (rows, kv_heads, new, head) of each layer.
    """

    def __init__(self, d):
        super().__init__()
        self.embedding_scale, self.logits_scale, self.head_dim = d.embedding_scale, d.logits_scale, d.head_dim
        self.half = 0 if d.cos is None else d.cos.shape[1]
        self.embedding = nn.Parameter(torch.from_numpy(d.embedding), requires_grad=False)
        self.output = Linear(d.output, self.embedding if d.tied else None)
        self.blocks = nn.ModuleList(Block(d, b) for b in d.blocks)
        self.final_norm = Norm(d.final_norm, d.rms, d.eps)
        self.embedding_norm = None if d.embedding_norm is None else Norm(d.embedding_norm, d.rms, d.eps)
        for name in ("cos", "sin", "positions", "alibi"):
            value = getattr(d, name)
            self.register_buffer(name, None if value is None else torch.from_numpy(value))

    def forward(self, ids, lengths, *cache):
        places = lengths[:, None] + torch.arange(ids.shape[1])[None]
        x = F.embedding(ids, self.embedding) * self.embedding_scale
        if self.positions is not None:
            x = x + F.embedding(places, self.positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        held = torch.arange(cache[0].shape[2])
        refused = torch.finfo(torch.float32).min
        old = torch.where(held[None] < lengths[:, None], 0.0, refused)[:, None, None, :]
        step = torch.arange(ids.shape[1])
        new = torch.where(step[None, :] <= step[:, None], 0.0, refused)[None, None, None]
        if self.alibi is not None:
            # Slope times the key's position: a query's own part is the same for all its keys, and softmax takes it out.
            slopes = self.alibi[None, :, None, None]
            old = old + slopes * held
            new = new + (slopes * places[:, None, None, :])[:, :, None]
        turn = self.turn(places)
        news = []
        for block, key, value in zip(self.blocks, cache[0::2], cache[1::2]):
            x, key, value = block(x, turn, old, new, key, value)
            news += [key, value]
        logits = self.output(self.final_norm(x[:, -1])) * self.logits_scale
        return logits, *news

    def turn(self, places):
        """Rotary positions of a part of each head, its pairs half of that part apart."""
        if self.cos is None:
            return lambda x: x
        cos, sin = (F.embedding(places, table)[:, None] for table in (self.cos, self.sin))
        half, width = self.half, self.head_dim

        def turned(x):
            a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            parts = [a * cos - b * sin, b * cos + a * sin]
            return torch.cat(parts if 2 * half == width else [*parts, rest], -1)

        return turned


def example(d):
    """Inputs of different sizes, so that no size is taken for a constant."""
    cache = [torch.zeros(2, d.kv_heads, 5, d.head_dim) for _ in range(2 * len(d.blocks))]
    return torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.tensor([4, 5]), *cache


def cache_names(d, prefix):
    return [f"{prefix}.{i}.{part}" for i in range(len(d.blocks)) for part in ("key", "value")]


def description(d, dtype, weight_bytes):
    """joulecast.json; `weight_bytes` are those of the file with the weights, of which a step reads all but what it looks up."""
    width = 2 if dtype == "f16" else 4
    looked_up = sum(a.size for a in (None if d.tied else d.embedding, d.positions, d.cos, d.sin) if a is not None) * width
    return describe(d, CACHE, dtype, weight_bytes - looked_up)


def describe(d, kv_cache, dtype, step_weight_bytes):
    """What joulecast.json says of a model; `step_weight_bytes` are those of the weights that a step reads."""
    matrices = [part.weight.size for b in d.blocks for part in (b.q, b.k, b.v, b.o, b.up, b.down, b.gate) if part is not None]
    return {
        "kv_cache": kv_cache, "architecture": d.family, "dtype": dtype, "parameters": d.parameters,
        "max_positions": d.max_positions, "layers": len(d.blocks), "kv_heads": d.kv_heads, "head_dim": d.head_dim,
        "vocab": d.vocab,
        "work": {"step_weight_bytes": step_weight_bytes, "block_flops_per_token": 2 * sum(matrices),
                 "output_flops_per_row": 2 * d.output.weight.size,
                 "attention_flops_per_position": 4 * len(d.blocks) * d.heads * d.head_dim},
    }
