"""Makes the golden values that the engines are tested against.

    python make_golden.py tiny     # the tiny random models and their golden.json
    python make_golden.py onnx     # model.onnx in some of them, and tiny-gpt-neox, which has nothing else (runs with tools/requirements.txt)
    python make_golden.py openvino # model.xml and model.bin beside those (runs with tools/requirements.txt)
    python make_golden.py torchscript # torchscript/: modules of the same models (runs with tools/requirements.txt)
    python make_golden.py gguf     # the files in gguf, with golden values of the weights that they hold (runs with tools/requirements.txt)
    python make_golden.py demo     # golden.json, tokens.json and chat.json for ../../../tests/demo/model

The reference is Hugging Face transformers on CPU: weights in float32 (bf16 weights are upcast when
loaded), eager attention, KV cache on, one thread. README.md in this folder describes the files.
"""

import argparse
import json
import pathlib
import random

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
DEMO = HERE.parents[2] / "tests" / "demo" / "model"
VOCAB = 160
TOP = 8
STEPS = 40

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
)

# Lengths of the prompts in tokens; the longest passes the original context of tiny-llama3-rope (64).
PROMPT_LENGTHS = [1, 2, 7, 23, 96]

TINY = {
    "tiny-llama": dict(
        config=LlamaConfig(**COMMON, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
        model=LlamaForCausalLM, seed=101, shards=1),
    "tiny-llama-sharded": dict(
        config=LlamaConfig(**COMMON, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True),
        model=LlamaForCausalLM, seed=112, shards=2),
    "tiny-llama-headdim": dict(
        # head_dim is not hidden_size / heads, there are biases, and the epsilon is large enough to
        # change the tokens when it is read wrongly: the config allows all of it.
        config=LlamaConfig(**COMMON, head_dim=12, attention_bias=True, mlp_bias=True,
                           rms_norm_eps=0.05, rope_theta=500000.0, tie_word_embeddings=False),
        model=LlamaForCausalLM, seed=103, shards=1),
    "tiny-llama3-rope": dict(
        config=LlamaConfig(**COMMON, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
                           rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                             high_freq_factor=4.0, original_max_position_embeddings=64)),
        model=LlamaForCausalLM, seed=104, shards=1),
    "tiny-qwen2": dict(
        config=Qwen2Config(**COMMON, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=False),
        model=Qwen2ForCausalLM, seed=105, shards=1),
    "tiny-qwen2-tied": dict(
        config=Qwen2Config(**COMMON, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True),
        model=Qwen2ForCausalLM, seed=106, shards=1),
}


def randomise(model, seed):
    """Weights of a spread that makes greedy output varied, and norms and biases that are not 1 and 0."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=gen, dtype=torch.float32)
            if "norm" in name:
                p.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.5 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(0.25 * noise)
    model.tie_weights()


@torch.no_grad()
def greedy(model, prompt, steps):
    """Greedy decoding with the KV cache, written out so that each step's margin is kept.

    It runs for `steps` tokens, past any end-of-text token.
    """
    out = model(torch.tensor([prompt]), use_cache=True)
    first = out.logits[0, -1].float()
    top = torch.topk(first, TOP)
    case = {
        "prompt_ids": prompt,
        "generated_ids": [],
        "margins": [],
        "first_logits_top": [[int(i), float(v)] for v, i in zip(top.values, top.indices)],
    }
    for _ in range(steps):
        logits = out.logits[0, -1].float()
        two = torch.topk(logits, 2)
        token = int(two.indices[0])
        case["generated_ids"].append(token)
        case["margins"].append(round(float(two.values[0] - two.values[1]), 6))
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return case


@torch.no_grad()
def check_without_cache(model, case):
    """The same tokens without a KV cache: the golden values do not rest on the cache's code."""
    ids = list(case["prompt_ids"])
    for want, margin in zip(case["generated_ids"], case["margins"]):
        got = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        assert got == want or margin < 1e-4, (got, want, margin)
        ids.append(want)


def compact(doc, path):
    """JSON with one line per case field: readable in a diff, and without a line per number."""
    def dump(value):
        return json.dumps(value, ensure_ascii=False)

    lines = ["{"]
    head = {k: v for k, v in doc.items() if k != "cases"}
    for key, value in head.items():
        lines.append(f"  {dump(key)}: {dump(value)},")
    lines.append('  "cases": [')
    for n, case in enumerate(doc["cases"]):
        lines.append("    {")
        lines.append(",\n".join(f"      {dump(k)}: {dump(v)}" for k, v in case.items()))
        lines.append("    }" + ("," if n + 1 < len(doc["cases"]) else ""))
    lines += ["  ]", "}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    json.loads(path.read_text(encoding="utf-8"))


def header(config):
    return {
        "dtype": "f32",
        "reference": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU, eager",
        "eos_token_id": config.eos_token_id,
    }


def write_config(config, architecture, path):
    """config.json in the spelling of published checkpoints (rope_theta and rope_scaling at the top)."""
    doc = {
        "architectures": [architecture],
        "model_type": config.model_type,
        "torch_dtype": "float32",
        "hidden_act": config.hidden_act,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        **COMMON,
    }
    rope = dict(config.rope_parameters)
    doc["rope_theta"] = rope.pop("rope_theta")
    doc["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if config.model_type == "llama":
        doc["attention_bias"] = config.attention_bias
        doc["mlp_bias"] = config.mlp_bias
        if config.head_dim != config.hidden_size // config.num_attention_heads:
            doc["head_dim"] = config.head_dim
    else:
        doc["use_sliding_window"] = False
    path.write_text(json.dumps(doc, indent=2, sort_keys=True) + "\n")


def write_tokenizer(path):
    """The words t0, t1, ... as tokens: every model here has the same vocabulary, and one file serves them all."""
    model = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(VOCAB)}, "unk_token": "t0"}
    doc = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
           "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model}
    path.write_text(json.dumps(doc) + "\n")


def save_weights(model, folder, shards):
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    names = sorted(tensors)
    meta = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=meta)
        return
    # Cut inside a layer, so that a loader must look tensors up by the index and not by layer.
    cut = len(names) // shards
    weight_map, total = {}, 0
    for n in range(shards):
        part = names[n * cut:(n + 1) * cut] if n + 1 < shards else names[n * cut:]
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        save_file({k: tensors[k] for k in part}, folder / file, metadata=meta)
        weight_map |= {k: file for k in part}
        total += sum(tensors[k].numel() * 4 for k in part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def tiny():
    write_tokenizer(HERE / "tiny-llama" / "tokenizer.json")
    for name, spec in TINY.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        config = spec["config"]
        model = spec["model"](config)
        randomise(model, spec["seed"])
        save_weights(model, folder, spec["shards"])
        write_config(config, spec["model"].__name__, folder / "config.json")

        # What was written is what is run: the config and weights are read back from disk.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model.eval()
        rng = random.Random(spec["seed"])
        cases = []
        for length in PROMPT_LENGTHS:
            prompt = [rng.randrange(2, VOCAB) for _ in range(length)]
            case = greedy(model, prompt, STEPS)
            check_without_cache(model, case)
            cases.append(case)
        compact({**header(config), "cases": cases}, folder / "golden.json")
        distinct = [len(set(c["generated_ids"])) for c in cases]
        least = min(min(c["margins"]) for c in cases)
        print(f"{name}: distinct ids of {STEPS}: {distinct}, least margin {least}")


# Text prompts for the demo model, and message lists for its chat template.
DEMO_TEXTS = [
    "fn main() {\n",
    "/// Returns the larger of two numbers.\npub fn max(a: u32, b: u32) -> u32 {\n",
    "use std::collections::HashMap;\n\nimpl Counter {\n    pub fn new() -> Self {\n        Self {",
    "#[derive(Debug, Clone)]\npub struct Config {\n    pub name: String,\n",
    "#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn ",
    "match self {\n    Some(value) => ",
    "// naïve – ünïcode ✓ 速度\nlet s = \"héllo\";\n",
]
TOKENIZER_TEXTS = DEMO_TEXTS + [
    "",
    " ",
    "\n\n\n\t\t  x\r\n",
    "    let x = 0xFF_u8 as f32 * 1.5e-3;",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "👩‍👩‍👧 e\u0301 \u00a0 \ufeff",
    "it's we'll don't r#\"raw\"# 'a b'",
]
DEMO_CHATS = [
    [{"role": "user", "content": "Write a function that adds two numbers."}],
    [{"role": "system", "content": "You complete Rust code."},
     {"role": "user", "content": "fn is_empty(&self) -> bool {"}],
    [{"role": "user", "content": "struct Point"},
     {"role": "assistant", "content": "pub struct Point {\n    x: f64,\n    y: f64,\n}"},
     {"role": "user", "content": "Now with z; naïve <|im_end|> in the text"}],
]


def demo():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    out = HERE / "demo"
    out.mkdir(exist_ok=True)

    cases = []
    for text in DEMO_TEXTS:
        ids = tokenizer(text)["input_ids"]
        case = greedy(model, ids, STEPS)
        check_without_cache(model, case)
        generated = tokenizer.decode(case["generated_ids"])
        cases.append({"prompt": text, **case, "text": generated})
    compact({**header(model.config), "cases": cases}, out / "golden.json")

    chats = []
    for messages in DEMO_CHATS:
        for generation in (True, False):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            direct = tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=generation, return_dict=True)["input_ids"]
            assert ids == direct
            chats.append({"messages": messages, "add_generation_prompt": generation, "text": text, "ids": ids})
    texts = []
    for text in TOKENIZER_TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text, text
        texts.append({"text": text, "ids": ids})
    reference = header(model.config)["reference"]
    compact({"reference": reference, "cases": texts}, out / "tokens.json")
    compact({"reference": reference, "cases": chats}, out / "chat.json")
    print("demo:", [round(min(c["margins"]), 5) for c in cases], [len(c["generated_ids"]) for c in cases])


# What the ONNX engine is tested on: rotary positions inside attention, with tied and untied output layers; and positions as
# an input (GPT-NeoX turns only a part of each head).
ONNX = ["tiny-llama", "tiny-qwen2-tied", "tiny-gpt-neox"]


def onnx():
    import sys
    sys.path.insert(0, str(HERE.parents[2] / "tools"))
    from packing import decoder, onnx_graph

    name, seed = "tiny-gpt-neox", 107
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    config = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                           max_position_embeddings=512, rotary_pct=0.25, bos_token_id=0, eos_token_id=1)
    model = GPTNeoXForCausalLM(config).eval()
    randomise(model, seed)
    config.save_pretrained(folder)
    rng = random.Random(seed)
    cases = [greedy(model, [rng.randrange(2, VOCAB) for _ in range(length)], STEPS) for length in PROMPT_LENGTHS]
    for case in cases:
        check_without_cache(model, case)
    compact({**header(config), "cases": cases}, folder / "golden.json")
    print(f"{name}: least margin {min(min(c['margins']) for c in cases)}")
    for folder in (HERE / n for n in ONNX):
        source = model if folder.name == name else decoder.load(folder)
        onnx_graph.save(onnx_graph.build(decoder.read(source), "f32"), str(folder / "model.onnx"), None)


def openvino():
    """IR beside the weights that the ONNX engine is tested on, of the same models."""
    import sys
    sys.path.insert(0, str(HERE.parents[2] / "tools"))
    from packing import decoder, openvino_ir

    for name in ONNX:
        openvino_ir.write(decoder.read(graph_source(name)), "f32", HERE / name)


def graph_source(name):
    """The model of one of the folders in ONNX."""
    from packing import decoder

    folder = HERE / name
    if name != "tiny-gpt-neox":
        return decoder.load(folder)
    model = GPTNeoXForCausalLM(GPTNeoXConfig.from_pretrained(folder)).eval()
    randomise(model, 107)
    return model


def torchscript():
    """Modules of the models that have graphs, in folders of their own, and of one of them in bf16."""
    import sys
    sys.path.insert(0, str(HERE.parents[2] / "tools"))
    from packing import decoder, torchscript as writer

    for name, dtype, folder in [(n, "f32", n) for n in ONNX] + [("tiny-llama", "bf16", "tiny-llama-bf16")]:
        folder = HERE / "torchscript" / folder
        folder.mkdir(parents=True, exist_ok=True)
        writer.write(decoder.read(graph_source(name)), dtype, folder)


def gguf():
    """Weights in GGUF, and what transformers makes of exactly these weights: rounding them is not what is tested."""
    import sys
    sys.path.insert(0, str(HERE.parents[2] / "tools"))
    from gguf import GGUFReader, quants
    from packing import decoder, gguf_file

    out = HERE / "gguf"
    out.mkdir(exist_ok=True)
    for name in ("tiny-llama3-rope", "tiny-qwen2"):
        # f32: the golden values are those of the folder
        model = decoder.load(HERE / name)
        gguf_file.write(decoder.read(model), model.config, "f32", str(out / f"{name}.gguf"))
    shape = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 1}
    for dtype, seed, kind in (("q8_0", 108, "llama"), ("q4_0", 109, "llama"), ("q8_0", 110, "qwen2"), ("f16", 111, "llama"),
                              ("q4_K", 112, "llama")):
        if dtype == "q4_K":
            shape = {**shape, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        config = LlamaConfig(**shape, rms_norm_eps=1e-5) if kind == "llama" else Qwen2Config(**shape, rms_norm_eps=1e-5)
        model = (LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM)(config).eval()
        randomise(model, seed)
        path = out / f"tiny-{kind}-{dtype}.gguf"
        gguf_file.write(decoder.read(model), model.config, dtype, str(path))
        # The model with the weights as the file has them; biases and norms are f32 there and stay.
        stored = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
        parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
                 "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
        state = model.state_dict()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for i in range(config.num_hidden_layers):
            for own, theirs in parts.items():
                w = stored[f"blk.{i}.{own}.weight"]
                if kind == "llama" and own in heads:
                    w = w.reshape(heads[own], w.shape[0] // heads[own] // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
                state[f"model.layers.{i}.{theirs}.weight"] = torch.tensor(np.ascontiguousarray(w))
        state["model.embed_tokens.weight"] = torch.tensor(stored["token_embd.weight"])
        state["lm_head.weight"] = torch.tensor(stored["output.weight"])
        model.load_state_dict(state)
        rng = random.Random(seed)
        cases = [greedy(model, [rng.randrange(2, VOCAB) for _ in range(length)], STEPS) for length in PROMPT_LENGTHS]
        compact({**header(config), "cases": cases}, out / f"tiny-{kind}-{dtype}.json")
        print(f"{path.name}: least margin {min(min(c['margins']) for c in cases)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tiny", "onnx", "openvino", "torchscript", "gguf", "demo"])
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    {"tiny": tiny, "onnx": onnx, "openvino": openvino, "torchscript": torchscript, "gguf": gguf, "demo": demo}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
