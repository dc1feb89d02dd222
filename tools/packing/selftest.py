"""Packs a tiny random model of every family and compares it with transformers: `make tools-test`.

Norms, biases and positions are random too, so that one that is left out or misplaced shows.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers as t

from . import check, decoder, onnx_graph, openvino_ir, torchscript

SMALL = dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1)
LLAMA = SMALL | dict(intermediate_size=72, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None)
GPT = dict(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1)

MODELS = {
    "llama": t.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama, biases, linear scaling": t.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True,
                                                   rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "mistral": t.MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": t.Qwen2Config(**LLAMA),
    "qwen3": t.Qwen3Config(**LLAMA, head_dim=32),
    "granite": t.GraniteConfig(**LLAMA, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.1, logits_scaling=2.0),
    "gemma": t.GemmaConfig(**LLAMA, head_dim=32),
    "stablelm": t.StableLmConfig(**LLAMA, use_qkv_bias=True, partial_rotary_factor=0.5),
    "stablelm, parallel": t.StableLmConfig(**LLAMA, use_parallel_residual=True, partial_rotary_factor=0.5),
    "starcoder2": t.Starcoder2Config(**LLAMA, sliding_window=None),
    "starcoder2, window": t.Starcoder2Config(**LLAMA, sliding_window=100),
    "phi": t.PhiConfig(**LLAMA, partial_rotary_factor=0.5),
    "gpt_neox": t.GPTNeoXConfig(**SMALL, intermediate_size=96, max_position_embeddings=256, rotary_pct=0.25),
    "gpt_neox, serial": t.GPTNeoXConfig(**SMALL, intermediate_size=96, max_position_embeddings=256, use_parallel_residual=False),
    "gpt2": t.GPT2Config(**GPT),
    "gpt2, scores by layer": t.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt_bigcode": t.GPTBigCodeConfig(**GPT, multi_query=True, pad_token_id=None),
    "gpt_bigcode, all heads": t.GPTBigCodeConfig(**GPT, multi_query=False, pad_token_id=None),
    "bloom": t.BloomConfig(vocab_size=160, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    "bloom, heads no power of two": t.BloomConfig(vocab_size=160, hidden_size=96, n_layer=2, n_head=6),
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            norm = any(part in name for part in ("norm", "ln_"))
            p.copy_(1.0 + 0.2 * noise if norm and name.endswith("weight") else 0.25 * noise)
    model.tie_weights()


def main():
    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    failed = 0
    for seed, (name, config) in enumerate(MODELS.items()):
        with tempfile.TemporaryDirectory() as folder:
            model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            randomise(model, seed)
            model.save_pretrained(folder)
            model = decoder.load(folder)
            path = str(Path(folder) / "model.onnx")
            try:
                neutral = decoder.read(model)
                want = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
                if neutral.parameters != want:
                    raise check.Differs(f"{neutral.parameters} parameters, not {want}")
                onnx_graph.save(onnx_graph.build(neutral, "f32"), path, None)
                onnx = lambda rows, length: check.OnnxModel(path, rows, length)
                worst = check.same_tokens(model, onnx, path, neutral.vocab, neutral.max_positions)
                openvino_ir.write(neutral, "f32", Path(folder))
                ir = lambda rows, length: openvino_ir.OpenVinoModel(Path(folder), neutral, rows)
                other = check.same_tokens(model, ir, folder, neutral.vocab, neutral.max_positions)
                torchscript.write(neutral, "f32", Path(folder))
                script = lambda rows, length: torchscript.TorchScriptModel(Path(folder), neutral, "f32", rows, length)
                third = max(check.same_tokens(model, script, folder, neutral.vocab, neutral.max_positions),
                            check.rows_apart(script, folder, neutral.vocab))
                print(f"{name}: equal tokens, largest difference of a logit {worst:.1e} (ONNX), {other:.1e} (OpenVINO), "
                      f"{third:.1e} (TorchScript) of their spread")
            except Exception as problem:  # every family is reported, whatever one does
                failed += 1
                print(f"{name}: FAILED: {type(problem).__name__}: {problem}")
    sys.exit(f"{failed} of {len(MODELS)} failed" if failed else 0)


if __name__ == "__main__":
    main()
