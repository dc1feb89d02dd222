"""Makes `families/*.json`: what a tiny model of each family says in transformers (runs with tools/requirements.txt).

    python make_families.py            # all of them
    python make_families.py gpt2 phi   # these

No weights are stored. A value is a function of its tensor's name and its place in it (`noise`), and each file lists names, shapes,
means and spreads, so that the tests make the same safetensors file to the bit. `config` is spelt as the family's published models spell
it, its sizes scaled down. README.md in this folder describes the files.
"""

import json
import pathlib
import random
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from make_golden import HERE, VOCAB, check_without_cache, compact, greedy, header

PROMPT_LENGTHS = [1, 17, 90]
STEPS = 24

COMMON = dict(bos_token_id=0, eos_token_id=1, torch_dtype="float32", vocab_size=VOCAB)
LLAMA = COMMON | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=512)
GPT = COMMON | dict(n_embd=64, n_head=4, n_layer=2, n_positions=128, layer_norm_epsilon=1e-5)

FAMILIES = {
    "mistral": LLAMA | dict(model_type="mistral", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=None,
                            tie_word_embeddings=False),
    "qwen3": LLAMA | dict(model_type="qwen3", attention_bias=False, head_dim=32, hidden_act="silu", max_window_layers=2,
                          rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
                          tie_word_embeddings=True, use_sliding_window=False),
    "granite": LLAMA | dict(model_type="granite", attention_bias=False, attention_multiplier=0.1, embedding_multiplier=3.0,
                            hidden_act="silu", logits_scaling=2.0, mlp_bias=False, residual_multiplier=0.4,
                            rms_norm_eps=1e-5, rope_theta=10000, tie_word_embeddings=True),
    "granite-biases": LLAMA | dict(model_type="granite", attention_bias=True, attention_multiplier=0.1, embedding_multiplier=3.0,
                                   hidden_act="silu", logits_scaling=2.0, mlp_bias=True, residual_multiplier=0.4,
                                   rms_norm_eps=1e-5, rope_theta=10000, tie_word_embeddings=False),
    "gemma": LLAMA | dict(model_type="gemma", attention_bias=False, head_dim=32, hidden_act="gelu",
                          hidden_activation="gelu_pytorch_tanh", num_key_value_heads=1, rms_norm_eps=1e-6,
                          rope_scaling=None, rope_theta=10000.0),
    "stablelm": LLAMA | dict(model_type="stablelm", hidden_act="silu", layer_norm_eps=1e-5, num_key_value_heads=4,
                             partial_rotary_factor=0.25, rope_theta=1000000, tie_word_embeddings=False, use_qkv_bias=False),
    "stablelm-parallel": LLAMA | dict(model_type="stablelm", hidden_act="silu", layer_norm_eps=1e-5, partial_rotary_factor=0.5,
                                      rope_theta=10000, tie_word_embeddings=False, use_parallel_residual=True,
                                      use_qkv_bias=True),
    "starcoder2": LLAMA | dict(model_type="starcoder2", hidden_act="gelu_pytorch_tanh", mlp_type="default", norm_epsilon=1e-5,
                               norm_type="layer_norm", rope_theta=999999.4420358813, sliding_window=128, use_bias=True),
    "phi": LLAMA | dict(model_type="phi", hidden_act="gelu_new", layer_norm_eps=1e-5, num_key_value_heads=4,
                        partial_rotary_factor=0.4, qk_layernorm=False, rope_scaling=None, rope_theta=10000.0,
                        tie_word_embeddings=False),
    "gpt_neox": COMMON | dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=64, intermediate_size=96, layer_norm_eps=1e-5,
                              max_position_embeddings=512, num_attention_heads=4, num_hidden_layers=2, rotary_emb_base=10000,
                              rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True),
    "gpt_neox-serial": COMMON | dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=64, intermediate_size=96,
                                     layer_norm_eps=1e-5, max_position_embeddings=512, num_attention_heads=4,
                                     num_hidden_layers=2, rotary_emb_base=10000, rotary_pct=0.5, tie_word_embeddings=False,
                                     use_parallel_residual=False),
    "gpt2": GPT | dict(model_type="gpt2", activation_function="gelu_new", n_ctx=128),
    # codeparrot-small has these two.
    "gpt2-by-layer": GPT | dict(model_type="gpt2", activation_function="gelu_new", n_ctx=128, n_inner=None,
                                reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=True),
    "gpt_bigcode": GPT | dict(model_type="gpt_bigcode", activation_function="gelu_pytorch_tanh", attention_softmax_in_fp32=True,
                              multi_query=True, n_inner=192, scale_attention_softmax_in_fp32=True, scale_attn_weights=True),
    "gpt_bigcode-all-heads": GPT | dict(model_type="gpt_bigcode", activation_function="gelu", multi_query=False, n_inner=192),
    "bloom": COMMON | dict(model_type="bloom", apply_residual_connection_post_layernorm=False, layer_norm_epsilon=1e-5,
                           n_embed=64, n_inner=None, n_layer=2, num_attention_heads=4, offset_alibi=100, seq_length=512),
    # A number of heads that is no power of two.
    "bloom-six-heads": COMMON | dict(model_type="bloom", layer_norm_epsilon=1e-5, hidden_size=96, n_layer=2, n_head=6,
                                     seq_length=512),
}


def noise(name, count):
    """Uniform in [-1, 1), in steps of 2^-23: SplitMix64 in counter mode, from the FNV-1a hash of the name."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1.0)


# Embeddings of families that scale or normalise them, or whose output layer is the embedding: small, or a token would only repeat itself.
EMBEDDING_SPREAD = {"granite": 0.2, "gemma": 0.05, "starcoder2": 0.3, "qwen3": 0.3}


def mean_and_spread(family, name):
    """Weights of a spread that makes greedy output varied, and norms and biases that are not 1 and 0."""
    if name.endswith("bias"):
        return 0.0, 0.15 if family == "bloom" else 0.5
    if "embeddings_layernorm" in name:
        return 0.2, 0.1
    if "norm" in name or ".ln_" in name:
        return (0.0 if family == "gemma" else 1.0), 0.35
    if any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
        return 0.0, EMBEDDING_SPREAD.get(family, 0.8)
    return 0.0, 0.6 if family == "bloom" else 0.4


def values(name, shape, mean, spread):
    count = int(np.prod(shape))
    return (np.float32(mean) + np.float32(spread) * noise(name, count)).reshape(shape)


def make(name, config):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        # Names and shapes as transformers writes them.
        (folder / "config.json").write_text(json.dumps(config))
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        with safe_open(folder / "model.safetensors", framework="np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        tensors = [[key, shape, *mean_and_spread(config["model_type"], key)] for key, shape in sorted(shapes.items())]

        # What was written is what is run: with the published spelling of the configuration.
        (folder / "config.json").write_text(json.dumps(config))
        save_file({t[0]: values(*t) for t in tensors}, folder / "model.safetensors", metadata={"format": "pt"})
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"], told
        model.eval()

        rng = random.Random(name)
        cases = []
        for length in PROMPT_LENGTHS:
            prompt = [rng.randrange(2, VOCAB) for _ in range(length)]
            case = greedy(model, prompt, STEPS)
            check_without_cache(model, case)
            del case["first_logits_top"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt])).logits[0, -1]
            case["first_logits"] = [float(f"{v:.7g}") for v in logits.tolist()]
            cases.append(case)
    doc = {**header(model.config), "parameters": model.num_parameters(), "config": config, "tensors": tensors, "cases": cases}
    compact(doc, HERE / "families" / f"{name}.json")
    distinct = [len(set(c["generated_ids"])) for c in cases]
    print(f"{name}: distinct ids of {STEPS}: {distinct}, least margin {min(min(c['margins']) for c in cases)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    (HERE / "families").mkdir(exist_ok=True)
    for name in sys.argv[1:] or FAMILIES:
        make(name, FAMILIES[name])
