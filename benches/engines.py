"""Our engines beside their peers in Python, in turns, on one machine: `make bench-engines`.

Each round measures everything once, one after the other, so that whatever else the machine does falls on all; ratios are
taken within a round, and medians over the rounds. Ours are measured by `joulecast-runtime bench`, which also measures what the
machine can do just before; the peers here run the same shape with as many threads, prompts and tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

OURS = {
    "candle f32": ("candle", "smollm2", []),
    "candle q8_0": ("candle", "smollm2", ["--dtype", "q8_0"]),
    "candle q4_0": ("candle", "smollm2", ["--dtype", "q4_0"]),
    "onnx f32": ("onnx", "packs/onnx-f32", []),
    "onnx int8": ("onnx", "packs/onnx-int8", []),
    "onnx int4": ("onnx", "packs/onnx-int4", []),
    "openvino f32": ("openvino", "packs/openvino-f32", []),
}
# llama.cpp itself, where the runtime was built with it (make engine-llamacpp).
LLAMA = {f"llamacpp {dtype}": ("llamacpp", f"packs/gguf-{dtype}", []) for dtype in ("f32", "q8_0", "q4_0")}
# libtorch, where the runtime was built with it (make engine-torch).
TORCH = {f"torchscript {dtype}": ("torchscript", f"packs/torchscript-{dtype}", []) for dtype in ("f32", "bf16")}
TORCH |= {f"torch {dtype}": ("torch", "smollm2", ["--dtype", dtype]) for dtype in ("f32", "bf16")}
# Where a runtime that is linked with libtorch finds it; the peers in Python have their own.
LIBRARIES = {**os.environ, "LD_LIBRARY_PATH": str(HERE.parent / "build/torch/lib")}
# Which of ours each peer is compared with: the same weights.
PEERS = {"onnxruntime f32": "onnx f32", "onnxruntime int8": "onnx int8", "transformers f32": "candle f32"}


def ours(name, given):
    engine, directory, more = (OURS | LLAMA | TORCH)[name]
    command = [given.runtime, "bench", "--engine", engine, "--provider", "cpu", "--model", str(given.models / directory),
               "--prompt-tokens", str(given.prompt), "--gen-tokens", str(given.tokens), "--batch", str(given.batch[0]),
               "--threads", str(given.threads), "--repeat", "1", "--output", "json", *more]
    run = subprocess.run(command, capture_output=True, text=True, env=LIBRARIES)
    if run.returncode != 0:
        sys.exit(f"{' '.join(command)}: {run.stderr.strip()}")
    report = json.loads(run.stdout)
    share = lambda phase: (report[phase]["share_of_limit"] or {}).get("median")
    return {"prefill": report["prefill"]["tokens_per_second"]["median"], "decode": report["decode"]["tokens_per_second"]["median"],
            "prefill_share": share("prefill"), "decode_share": share("decode")}


def timed(given, prefill, decode):
    """Rates of a peer: one prompt for each sequence, then steps of all together; a first round goes unmeasured."""
    for _ in range(2):
        began = time.perf_counter()
        prefill()
        between = time.perf_counter()
        for step in range(given.tokens):
            decode(step)
        end = time.perf_counter()
    count = given.batch[0]
    return {"prefill": count * given.prompt / (between - began), "decode": count * given.tokens / (end - between)}


def onnx_peer(given, dtype):
    """ONNX Runtime as a Python user runs it: the same artifact, all sequences of one length."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    path = given.models / f"packs/onnx-{dtype}" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    room = given.prompt + given.tokens
    batch = given.batch[0]
    cache = {n: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((batch, s[1], room, s[3]), np.float32)) for n, s in shapes.items()}

    def run(tokens, length):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.ones((batch, tokens), np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((batch, length), np.int64))
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[:, -1].argmax(axis=-1)

    return timed(given, lambda: run(given.prompt, given.prompt), lambda step: run(1, given.prompt + step + 1))


def transformers_peer(given):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.models / "smollm2", dtype=torch.float32).eval()
    held = {}

    @torch.no_grad()
    def run(tokens, cache):
        held["cache"] = model(torch.ones((given.batch[0], tokens), dtype=torch.long), past_key_values=cache, use_cache=True,
                              logits_to_keep=1).past_key_values

    return timed(given, lambda: run(given.prompt, None), lambda step: run(1, held["cache"]))


def peer(name, given):
    """In a process of its own, so that its threads and memory are gone when the next one is measured."""
    arguments = [sys.executable, __file__, "--peer", name, "--models", str(given.models), "--prompt", str(given.prompt),
                 "--tokens", str(given.tokens), "--threads", str(given.threads), "--batch", str(given.batch[0])]
    run = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    if run.returncode != 0:
        sys.exit(f"{name}: {run.stderr.strip()[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def has(engine, given):
    """Whether the runtime's build holds an engine."""
    run = subprocess.run([given.runtime, "bench", "--engine", engine, "--provider", "cpu", "--model", "/nonexistent", "--prompt-tokens", "1",
                          "--gen-tokens", "1", "--batch", "1", "--repeat", "1"], capture_output=True, text=True, env=LIBRARIES)
    return "not in this build" not in run.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runtime", default=str(HERE.parent / "target/release/joulecast-runtime"))
    parser.add_argument("--models", type=Path, default=HERE.parent / "build/bench", help="holds smollm2 and packs, as the Makefile makes them")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences that are decoded together; several sizes are measured in each round")
    parser.add_argument("--only", nargs="+", help="these rows alone, by their names in the table")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        measured = transformers_peer(given) if given.peer.startswith("transformers") else onnx_peer(given, given.peer.split()[1])
        print(json.dumps(measured))
        return
    own, peers, pairs = list(OURS), list(PEERS), dict(PEERS)
    if has("llamacpp", given):
        own += LLAMA
        pairs |= {name: "candle " + name.split()[1] for name in LLAMA}
    if has("torchscript", given):
        own += TORCH
        pairs |= {"candle f32": "torch f32"}
    if given.only:
        own, peers = [[name for name in names if name in given.only] for names in (own, peers)]
        pairs = {name: mine for name, mine in pairs.items() if {name, mine} <= set(own + peers)}
    rounds = []
    for number in range(given.rounds):
        found = {}
        for batch in given.batch:
            this = argparse.Namespace(**{**vars(given), "batch": [batch]})
            found |= {(name, batch): ours(name, this) for name in own} | {(name, batch): peer(name, this) for name in peers}
        rounds.append(found)
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
    median = statistics.median
    print(f"{given.threads} threads, prompts of {given.prompt}, {given.tokens} tokens, medians of {given.rounds} rounds; tokens/s")
    first = given.batch[0]
    for batch in given.batch:
        print(f"{f'batch {batch}':20} {'prefill':>9} {'of limit':>9} {'decode':>9} {'of limit':>9} {f'x batch {first}':>9}")
        for name in [*own, *peers]:
            cells = [median([r[name, batch][phase] for r in rounds]) for phase in ("prefill", "decode")]
            shares = [[r[name, batch].get(f"{phase}_share") for r in rounds] for phase in ("prefill", "decode")]
            shown = [f"{100 * median(s):.0f} %" if None not in s else "" for s in shares]
            times = median([r[name, batch]["decode"] / r[name, first]["decode"] for r in rounds])
            print(f"{name:20} {cells[0]:9.1f} {shown[0]:>9} {cells[1]:9.1f} {shown[1]:>9} {times:9.2f}")
        for name, mine in pairs.items():
            ratios = [median([r[mine, batch][phase] / r[name, batch][phase] for r in rounds]) for phase in ("prefill", "decode")]
            print(f"{mine} is {ratios[0]:.2f} times as fast as {name} in prefill, {ratios[1]:.2f} times in decode")

if __name__ == "__main__":
    main()
