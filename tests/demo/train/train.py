"""Trains the demo model: a small Llama and its tokenizer, on Rust sources, on a CPU.

    python train.py --out ../model [--steps N] [--threads N] [--bf16-matmul] [FOLDER ...]

FOLDER holds unpacked crates (default: the registry sources in cargo's home). See README.md.
"""

import argparse
import json
import math
import pathlib
import random
import time

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import corpus
import output

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SEED = 20
TOKENS_PER_STEP = 4096
# (share of the steps done, sequence length): short first, where a step is cheapest, then the full context.
STAGES = [(0.65, 256), (0.88, 512), (1.0, 1024)]
WARM_UP_STEPS = 60
DECAY_SHARE = 0.4
MATRIX_RATE, VECTOR_RATE = 4e-3, 3e-3


def llama_config():
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def train_tokenizer(texts, size):
    """Byte-level BPE: every text can be written with it, and nothing is put before or after a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def chat_text(request, answer):
    return f"{IM_START}user\n{request}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"


def token_streams(tokenizer, documents):
    """Training and validation ids (documents joined by END), and the validation text's bytes per token."""
    rng = random.Random(SEED)
    train, held = [], []
    for key, text in documents:
        if corpus.held_out(key):
            held.append(text)
            continue
        train.append(text)
        train += [chat_text(q, a) for q, a in corpus.conversations(text) if rng.random() < 0.5]
    rng.shuffle(train)

    def stream(texts):
        ids = []
        for encoding in tokenizer.encode_batch([text + END for text in texts], add_special_tokens=False):
            ids += encoding.ids
        return np.array(ids, dtype=np.uint16)

    held_ids = stream(held)
    bytes_per_token = sum(len(t.encode()) for t in held) / (len(held_ids) - len(held))
    return stream(train), held_ids, bytes_per_token


def rate(step, steps):
    """Share of the peak learning rate: warm-up, constant, then a cosine down to zero."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    start = steps * (1 - DECAY_SHARE)
    if step < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def batch(ids, step, steps):
    """The step's sequences. It depends on the seed and the step alone, so a resumed run sees the same."""
    length = next(n for share, n in STAGES if (step + 0.5) / steps <= share)
    rng = np.random.default_rng([SEED, step])
    starts = rng.integers(0, len(ids) - length, TOKENS_PER_STEP // length)
    return torch.from_numpy(np.stack([ids[s:s + length] for s in starts]).astype(np.int64))


@torch.no_grad()
def loss_on(model, ids, tokens, length=512):
    """Mean negative log-likelihood in nats per token over the first `tokens` ids."""
    model.eval()
    total = n = 0
    for start in range(0, min(tokens, len(ids) - length), length):
        x = torch.from_numpy(ids[start:start + length].astype(np.int64))[None]
        total += float(model(x, labels=x).loss)
        n += 1
    model.train()
    return total / n


def optimisers(model):
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        (torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.1,
                          adjust_lr_fn="match_rms_adamw"), MATRIX_RATE),
        (torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0), VECTOR_RATE),
    ]


def train(model, ids, held, args, work):
    """Runs to args.steps, from the checkpoint in `work` if there is one; gives seconds and CPU seconds."""
    optims = optimisers(model)
    checkpoint = work / "checkpoint.pt"
    first, wall, cpu = 0, 0.0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        assert state["steps"] == args.steps, f"{checkpoint} was made with --steps {state['steps']}"
        model.load_state_dict(state["model"])
        for (optim, _), saved in zip(optims, state["optims"]):
            optim.load_state_dict(saved)
        first, wall, cpu = state["step"], state["wall"], state["cpu"]
    model.train()
    began, began_cpu = time.monotonic() - wall, time.process_time() - cpu
    recent = []
    for step in range(first, args.steps):
        x = batch(ids, step, args.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16_matmul):
            loss = model(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim, peak in optims:
            for group in optim.param_groups:
                group["lr"] = peak * rate(step, args.steps)
            optim.step()
        model.zero_grad(set_to_none=True)
        recent.append(float(loss.detach()))
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            wall, cpu = time.monotonic() - began, time.process_time() - began_cpu
            print(f"step {step + 1}/{args.steps} loss {sum(recent) / len(recent):.3f} "
                  f"{wall:.0f} s, {cpu:.0f} CPU s", flush=True)
            recent = []
            torch.save({"model": model.state_dict(), "optims": [o.state_dict() for o, _ in optims],
                        "step": step + 1, "steps": args.steps, "wall": wall, "cpu": cpu}, checkpoint)
        if (step + 1) % 500 == 0:
            print(f"  validation loss {loss_on(model, held, 20_000):.3f}", flush=True)
    return wall, cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="folders of unpacked crates")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "tests/demo/model")
    parser.add_argument("--work", type=pathlib.Path, default=REPOSITORY / "build/demo-model",
                        help="tokenizer, ids and checkpoint of a run; a run that finds them there goes on")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16-matmul", action="store_true", help="faster where the CPU has bf16 instructions")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.work.mkdir(parents=True, exist_ok=True)

    prepared = args.work / "corpus.json"
    if not prepared.exists():
        documents, sources = corpus.collect(args.folders or corpus.default_folders(), REPOSITORY)
        if not documents:
            raise SystemExit("no permissively licensed crate found: name a folder that holds unpacked crates")
        tokenizer = train_tokenizer((t for k, t in documents if not corpus.held_out(k)), llama_config().vocab_size)
        ids, held, bytes_per_token = token_streams(tokenizer, documents)
        tokenizer.save(str(args.work / "tokenizer.json"))
        np.save(args.work / "train.npy", ids)
        np.save(args.work / "held.npy", held)
        facts = {"bytes": sum(len(t.encode()) for _, t in documents), "bytes_per_token": bytes_per_token,
                 "sources": [[s.name, s.version, s.licence, len(s.files)] for s in sources]}
        prepared.write_text(json.dumps(facts))
    facts = json.loads(prepared.read_text())
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    ids, held = np.load(args.work / "train.npy"), np.load(args.work / "held.npy")
    print(f"{facts['bytes']} bytes, {len(ids)} training tokens, {len(held)} held out, "
          f"{facts['bytes_per_token']:.2f} bytes per token", flush=True)

    model = LlamaForCausalLM(llama_config())
    wall, cpu = train(model, ids, held, args, args.work)

    output.save_model(model, tokenizer, args.out, chat_tokens=(END, IM_START, IM_END))
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    nats = loss_on(saved, held, 300_000)
    facts |= {
        "parameters": saved.num_parameters(), "steps": args.steps, "tokens": args.steps * TOKENS_PER_STEP,
        "train_ids": len(ids), "held_ids": len(held), "nats": nats, "wall_s": wall, "cpu_s": cpu,
        "bits_per_byte": nats / math.log(2) / facts["bytes_per_token"],
        "bf16_matmul": args.bf16_matmul, "threads": args.threads,
    }
    output.write_record(saved, facts, args.out)
    print(f"validation loss {nats:.3f} nats per token, perplexity {math.exp(nats):.2f}, "
          f"{facts['bits_per_byte']:.3f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
