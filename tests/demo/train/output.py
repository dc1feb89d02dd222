"""Writes the trained model as Hugging Face lays it out, and TRAINING.md beside it."""

import json
import math

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer

# ChatML, as Qwen and others use it. A role that the model never saw is refused rather than guessed at.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('role must be system, user or assistant, not ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

SAMPLES = [
    "impl Point {\n    pub fn new(",
    "use std::fmt;\n\n/// An error of the parser.\n#[derive(Debug)]\npub enum ParseError {\n",
    "#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn ",
]
CHAT_SAMPLE = "Write a Rust function. Returns the number of elements in the list."


def write_json(path, doc):
    path.write_text(json.dumps(doc, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model(model, tokenizer, folder, chat_tokens):
    """bf16 safetensors, the configs, and the tokenizer. The tied output layer is not stored twice."""
    end, im_start, im_end = chat_tokens
    ids = {name: tokenizer.token_to_id(name) for name in chat_tokens}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()
               if k != "lm_head.weight"}
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})

    config = model.config
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": ids[end],
        "eos_token_id": ids[end],
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    })
    # A chat answer ends with im_end, a completed file with endoftext: either ends a generation.
    write_json(folder / "generation_config.json", {
        "bos_token_id": ids[end], "eos_token_id": [ids[end], ids[im_end]], "pad_token_id": ids[end],
    })
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[name]): {"content": name, "lstrip": False, "normalized": False, "rstrip": False,
                             "single_word": False, "special": True} for name in chat_tokens},
        "additional_special_tokens": [im_start, im_end],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "model_max_length": config.max_position_embeddings,
        "pad_token": end,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    })
    write_json(folder / "special_tokens_map.json", {
        "additional_special_tokens": [im_start, im_end], "eos_token": end, "pad_token": end,
    })


def complete(model, tokenizer, ids, tokens, seed=None):
    """Greedy, or sampled at temperature 0.6 when there is a seed."""
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, **sampling)
    return tokenizer.decode(out[0, len(ids):], skip_special_tokens=True)


def write_record(model, facts, folder):
    """TRAINING.md: figures, sample output, and every source with its licence."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    lines = [
        "# The demo model",
        "",
        "Written by `tests/demo/train/train.py`. A toy: it writes text that looks like Rust and knows nothing.",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | Llama: {model.config.num_hidden_layers} layers, hidden {model.config.hidden_size}, "
        f"{model.config.num_attention_heads} heads, {model.config.num_key_value_heads} key/value heads, "
        f"vocabulary {model.config.vocab_size}, context {model.config.max_position_embeddings}, tied embeddings |",
        f"| parameters | {facts['parameters']:,} |",
        f"| text | {facts['bytes']:,} bytes; {facts['train_ids']:,} training tokens, {facts['held_ids']:,} held out "
        f"(2 % of the files, by name); {facts['bytes_per_token']:.2f} bytes per token |",
        f"| trained on | {facts['tokens']:,} tokens in {facts['steps']} steps |",
        f"| time | {facts['wall_s'] / 60:.0f} min of wall time, {facts['cpu_s'] / 60:.0f} min of CPU time, "
        f"{facts['threads']} thread(s){', bf16 matrix products' if facts['bf16_matmul'] else ''} |",
        f"| held-out loss | {facts['nats']:.3f} nats per token, perplexity {math.exp(facts['nats']):.2f}, "
        f"{facts['bits_per_byte']:.3f} bits per byte (the bf16 weights as saved, windows of 512 tokens) |",
        f"| made with | torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__} |",
        "",
        "## What it writes",
        "",
    ]
    for title, seed in (("Greedy", None), ("Sampled, temperature 0.6, top_p 0.95", 1)):
        for prompt in SAMPLES:
            text = complete(model, tokenizer, tokenizer(prompt)["input_ids"], 80, seed)
            lines += [f"{title}; the prompt ends at `⟨…⟩`:", "", "```rust", f"{prompt}⟨…⟩{text}", "```", ""]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT_SAMPLE}], add_generation_prompt=True, return_dict=True)["input_ids"]
    lines += [f"Chat, greedy; user: \"{CHAT_SAMPLE}\"", "", "```rust", complete(model, tokenizer, chat, 80), "```", ""]
    lines += [
        "## Sources",
        "",
        "Crates whose licence lets one choose MIT or Apache-2.0, as far as the rules in `corpus.py` take their files.",
        "",
        "| crate | version | licence | files |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {version} | {licence} | {files} |" for name, version, licence, files in facts["sources"]]
    (folder / "TRAINING.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
