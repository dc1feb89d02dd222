"""A decoder-only transformer in one neutral form: what the writers of artifacts need, whatever the family calls it.

Weights are float32 numpy arrays of shape (outputs, inputs), as torch's Linear has them. `read` fills the form from a model
that transformers has loaded, so that every family's own ways of storing (joined or transposed matrices, shared heads,
scaled rotary frequencies) are undone by the library that defines them or here, and nowhere else.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class NotPacked(Exception):
    """This model cannot be packed; the message says why and what would do."""


@dataclass
class Linear:
    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass
class Norm:
    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass
class Block:
    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    up: Linear
    down: Linear
    gate: Linear | None = None  # gated MLPs: activation(gate) * up
    mlp_norm: Norm | None = None  # none: the MLP reads what the attention reads
    q_norm: np.ndarray | None = None  # RMSNorm of each head's query, as in Qwen3
    k_norm: np.ndarray | None = None


@dataclass
class Decoder:
    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rms: bool  # RMSNorm, else LayerNorm
    eps: float
    activation: str  # silu, gelu, gelu_tanh or relu
    embedding: np.ndarray
    final_norm: Norm
    output: Linear  # its weight is `embedding` itself where they are tied
    blocks: list[Block] = field(default_factory=list)
    parallel: bool = False  # attention and MLP both added to the same residual
    cos: np.ndarray | None = None  # (max_positions, rotary dimensions / 2); none: no rotary positions
    sin: np.ndarray | None = None
    positions: np.ndarray | None = None  # learned positions, by position
    embedding_norm: Norm | None = None
    alibi: np.ndarray | None = None  # slope of each head
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None  # none: 1 / sqrt(head_dim)
    logits_scale: float = 1.0

    @property
    def tied(self):
        return self.output.weight is self.embedding

    @property
    def parameters(self):
        """Weights of the model; a tied output layer counts once."""
        norms = [self.final_norm, self.embedding_norm]
        linears = [] if self.tied else [self.output]
        total = self.embedding.size + (self.positions.size if self.positions is not None else 0)
        for b in self.blocks:
            norms += [b.attention_norm, b.mlp_norm]
            linears += [b.q, b.k, b.v, b.o, b.up, b.down, b.gate]
            total += sum(n.size for n in (b.q_norm, b.k_norm) if n is not None)
        for part in norms + linears:
            if part is not None:
                total += part.weight.size + (part.bias.size if part.bias is not None else 0)
        return total


def load(directory):
    """The model as transformers runs it in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def array(tensor):
    return np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())


def linear(module):
    bias = getattr(module, "bias", None)
    return Linear(array(module.weight), None if bias is None else array(bias))


def transposed(module):
    """transformers' Conv1D: weights of shape (inputs, outputs)."""
    return Linear(array(module.weight.T), array(module.bias))


def norm(module, add=0.0):
    bias = getattr(module, "bias", None)
    return Norm(array(module.weight) + np.float32(add), None if bias is None else array(bias))


def rows(part, start, end):
    return Linear(part.weight[start:end], None if part.bias is None else part.bias[start:end])


ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}


def activation(name):
    if name not in ACTIVATIONS:
        raise NotPacked(f"config.json: activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read(model):
    """The neutral form of a loaded model."""
    config = model.config
    family = config.model_type
    if family not in FAMILIES:
        raise NotPacked(f"config.json: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        raise NotPacked("config.json: quantization_config: pack the unquantised model")
    with torch.no_grad():
        return FAMILIES[family](model, config)


def rotary(module, length):
    """cos and sin tables (length, rotary dimensions / 2) from the model's own rotary module, its scaling included."""
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return array(cos[0, :, :half]), array(sin[0, :, :half])


def full_attention_only(config):
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention"} or (not kinds and getattr(config, "use_sliding_window", False)):
        raise NotPacked("config.json: sliding-window attention is not implemented; full attention only")


def llama_like(model, config):
    """Llama, Mistral, Qwen2, Qwen3, Granite, Gemma, StableLM, StarCoder2 and Phi: the same places, other contents."""
    family = config.model_type
    if family in ("qwen2", "qwen3"):
        full_attention_only(config)
    positions = config.max_position_embeddings
    if getattr(config, "sliding_window", None) and family in ("mistral", "starcoder2"):
        # Full attention is the same as long as all of the sequence is in the window: so far the artifact goes.
        positions = min(positions, config.sliding_window)
    body = model.model
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    add = 1.0 if family == "gemma" else 0.0  # Gemma's norms multiply by 1 + weight
    eps = getattr(config, "rms_norm_eps", None)
    layer_eps = getattr(config, "layer_norm_eps", None) or getattr(config, "norm_epsilon", None)
    rms = eps is not None and family not in ("stablelm", "starcoder2", "phi")
    cos, sin = rotary(body.rotary_emb, positions)
    embedding = array(body.embed_tokens.weight)
    output = linear(model.lm_head)
    if model.lm_head.weight is body.embed_tokens.weight or torch.equal(model.lm_head.weight, body.embed_tokens.weight):
        output.weight = embedding
    final = body.final_layernorm if family == "phi" else body.norm
    decoder = Decoder(
        family=family, hidden=config.hidden_size, heads=heads, head_dim=head_dim,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads, vocab=embedding.shape[0],
        max_positions=positions, rms=rms, eps=eps if rms else layer_eps,
        activation=activation(getattr(config, "hidden_activation", None) or config.hidden_act),
        embedding=embedding, final_norm=norm(final, add), output=output, cos=cos, sin=sin,
        parallel=family == "phi" or bool(getattr(config, "use_parallel_residual", False)),
    )
    if family == "gemma":
        decoder.embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=torch.float32))
    if family == "granite":
        decoder.embedding_scale = config.embedding_multiplier
        decoder.residual_scale = config.residual_multiplier
        decoder.attention_scale = config.attention_multiplier
        decoder.logits_scale = 1.0 / config.logits_scaling
    for layer in body.layers:
        a, m = layer.self_attn, layer.mlp
        if getattr(a, "q_layernorm", None) is not None and family in ("stablelm", "phi"):
            raise NotPacked("config.json: qk_layernorm is not implemented for this family")
        block = Block(
            attention_norm=norm(layer.input_layernorm, add),
            q=linear(a.q_proj), k=linear(a.k_proj), v=linear(a.v_proj),
            o=linear(a.dense if family == "phi" else a.o_proj),
            up=linear(m.up_proj) if hasattr(m, "up_proj") else linear(m.fc1 if family == "phi" else m.c_fc),
            down=linear(m.down_proj) if hasattr(m, "down_proj") else linear(m.fc2 if family == "phi" else m.c_proj),
            gate=linear(m.gate_proj) if hasattr(m, "gate_proj") else None,
        )
        if family != "phi" and not (family == "stablelm" and decoder.parallel):
            block.mlp_norm = norm(layer.post_attention_layernorm, add)
        if family == "qwen3":
            block.q_norm, block.k_norm = array(a.q_norm.weight), array(a.k_norm.weight)
        decoder.blocks.append(block)
    return decoder


def by_heads(joined, heads, head_dim):
    """GPT-NeoX and BLOOM store each head's query, key and value together: their split."""
    parts = joined.weight.reshape(heads, 3, head_dim, -1)
    biases = joined.bias.reshape(heads, 3, head_dim)
    width = heads * head_dim
    return [Linear(np.ascontiguousarray(parts[:, i].reshape(width, -1)), np.ascontiguousarray(biases[:, i].reshape(width)))
            for i in range(3)]


def untied(weight, embedding_module, embedding):
    return embedding if torch.equal(weight, embedding_module.weight) else array(weight)


def gpt_neox(model, config):
    body = model.gpt_neox
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    embedding = array(body.embed_in.weight)
    head = model.embed_out if hasattr(model, "embed_out") else model.lm_head
    cos, sin = rotary(body.rotary_emb, config.max_position_embeddings)
    decoder = Decoder(
        family="gpt_neox", hidden=config.hidden_size, heads=heads, kv_heads=heads, head_dim=head_dim,
        vocab=embedding.shape[0], max_positions=config.max_position_embeddings, rms=False, eps=config.layer_norm_eps,
        activation=activation(config.hidden_act), embedding=embedding, final_norm=norm(body.final_layer_norm),
        output=Linear(untied(head.weight, body.embed_in, embedding)), cos=cos, sin=sin,
        parallel=config.use_parallel_residual,
    )
    for layer in body.layers:
        joined = linear(layer.attention.query_key_value)
        if joined.bias is None:
            raise NotPacked("config.json: attention_bias: false is not implemented for gpt_neox")
        q, k, v = by_heads(joined, heads, head_dim)
        decoder.blocks.append(Block(
            attention_norm=norm(layer.input_layernorm), q=q, k=k, v=v, o=linear(layer.attention.dense),
            mlp_norm=norm(layer.post_attention_layernorm), up=linear(layer.mlp.dense_h_to_4h),
            down=linear(layer.mlp.dense_4h_to_h)))
    return decoder


def gpt2(model, config):
    """GPT-2 and GPT-BigCode, whose heads share one key and value."""
    body = model.transformer
    bigcode = config.model_type == "gpt_bigcode"
    heads, hidden = config.n_head, config.n_embd
    head_dim = hidden // heads
    kv_heads = 1 if bigcode and config.multi_query else heads
    by_layer = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    embedding = array(body.wte.weight)
    part = linear if bigcode else transposed
    decoder = Decoder(
        family=config.model_type, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocab=embedding.shape[0], max_positions=config.n_positions, rms=False, eps=config.layer_norm_epsilon,
        activation=activation(config.activation_function), embedding=embedding, final_norm=norm(body.ln_f),
        output=Linear(untied(model.lm_head.weight, body.wte, embedding)), positions=array(body.wpe.weight),
        attention_scale=None if config.scale_attn_weights else 1.0,
    )
    for number, layer in enumerate(body.h, start=1):
        joined = part(layer.attn.c_attn)
        if bigcode and kv_heads == heads:
            q, k, v = by_heads(joined, heads, head_dim)
        else:
            kv = kv_heads * head_dim
            q, k, v = rows(joined, 0, hidden), rows(joined, hidden, hidden + kv), rows(joined, hidden + kv, hidden + 2 * kv)
        if by_layer:
            # Scores divided by the layer's number, as codeparrot-small has them: its queries are.
            q = Linear(q.weight / np.float32(number), q.bias / np.float32(number))
        decoder.blocks.append(Block(
            attention_norm=norm(layer.ln_1), q=q, k=k, v=v, o=part(layer.attn.c_proj), mlp_norm=norm(layer.ln_2),
            up=part(layer.mlp.c_fc), down=part(layer.mlp.c_proj)))
    return decoder


def bloom(model, config):
    body = model.transformer
    heads, hidden = config.n_head, config.hidden_size
    head_dim = hidden // heads
    if config.apply_residual_connection_post_layernorm:
        raise NotPacked("config.json: apply_residual_connection_post_layernorm is not implemented")
    embedding = array(body.word_embeddings.weight)
    # Slopes as in the paper on ALiBi, with the detour for head counts that are no power of two.
    power = 2 ** int(np.floor(np.log2(heads)))
    slopes = [2 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    decoder = Decoder(
        family="bloom", hidden=hidden, heads=heads, kv_heads=heads, head_dim=head_dim, vocab=embedding.shape[0],
        max_positions=2048, rms=False, eps=config.layer_norm_epsilon, activation="gelu_tanh", embedding=embedding,
        final_norm=norm(body.ln_f), output=Linear(untied(model.lm_head.weight, body.word_embeddings, embedding)),
        embedding_norm=norm(body.word_embeddings_layernorm), alibi=np.array(slopes, dtype=np.float32),
    )
    for layer in body.h:
        q, k, v = by_heads(linear(layer.self_attention.query_key_value), heads, head_dim)
        decoder.blocks.append(Block(
            attention_norm=norm(layer.input_layernorm), q=q, k=k, v=v, o=linear(layer.self_attention.dense),
            mlp_norm=norm(layer.post_attention_layernorm), up=linear(layer.mlp.dense_h_to_4h),
            down=linear(layer.mlp.dense_4h_to_h)))
    return decoder


FAMILIES = {
    **{name: llama_like for name in ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "stablelm", "starcoder2", "phi")},
    "gpt_neox": gpt_neox, "gpt2": gpt2, "gpt_bigcode": gpt2, "bloom": bloom,
}
