"""tools/modelpack: the command line."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

from . import check, decoder, gguf_file, manifest, onnx_graph, openvino_ir, torchscript
from .decoder import NotPacked

# What a runtime reads beside the weights.
COMPANIONS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "special_tokens_map.json"]
KINDS = {"onnx": ("f32", "int8", "int4"), "gguf": tuple(gguf_file.TYPES), "openvino": openvino_ir.DTYPES,
         "torchscript": tuple(torchscript.DTYPES)}
# Quality is measured on segments of a text, as `joulecast-runtime quality` does: rows at once, tokens of each, tokens at most.
ROWS, LENGTH, MOST = 8, 97, 8192


def main():
    given = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, out = Path(given.model), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    model = decoder.load(source)
    neutral = decoder.read(model)
    print(f"{neutral.family}: {neutral.parameters / 1e6:.1f}M parameters, {len(neutral.blocks)} layers", file=sys.stderr)
    packed, report = [], []
    for kind, dtype in given.artifacts:
        directory = out / f"{kind}-{dtype}"
        if directory.exists():
            sys.exit(f"{directory} is there already: remove it or name another --out")
        directory.mkdir()
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, directory / name)
        artifact = None
        if kind == "onnx":
            path = str(directory / "model.onnx")
            onnx_graph.save(onnx_graph.build(neutral, dtype), path, None if given.inline else "model.onnx.data")
            artifact = lambda rows, length: check.OnnxModel(path, rows, length)
        elif kind == "openvino":
            openvino_ir.write(neutral, dtype, directory)
            artifact = lambda rows, length: openvino_ir.OpenVinoModel(directory, neutral, rows)
        elif kind == "torchscript":
            torchscript.write(neutral, dtype, directory)
            artifact = lambda rows, length: torchscript.TorchScriptModel(directory, neutral, dtype, rows, length)
        else:
            gguf_file.write(neutral, model.config, dtype, str(directory / "model.gguf"))
        entry = {"format": kind, "dtype": dtype, "directory": directory.name}
        if artifact is not None:
            entry |= checked(model, neutral, dtype, artifact, directory, source, given.text)
        elif dtype != "f32" and given.text and given.runtime:
            entry |= by_runtime(given, directory, source)
        entry["bytes"] = sum(f.stat().st_size for f in directory.iterdir() if f.name.startswith("model."))
        manifest.write_sums(directory)
        entry["digest"] = manifest.digest(directory)
        print(json.dumps(entry), file=sys.stderr)
        packed.append((kind, dtype, directory.name, entry["bytes"], entry["digest"], own_accuracy(entry, given)))
        report.append(entry)
        if given.accuracy is None and "original_top1_accuracy" in entry:
            given.accuracy = (f"{entry['original_top1_accuracy']:.4f}", told(entry, given, "original_"))
    text = manifest.inference_model(given.name, neutral.parameters, given.claim, given.prefix, packed, given.accuracy)
    (out / "inferencemodel.yaml").write_text(text)
    print(json.dumps({"model": given.name, "parameters": neutral.parameters, "artifacts": report}, indent=2))


def checked(model, neutral, dtype, artifact, directory, source, text):
    """f32 must give the same tokens; a rounded artifact is compared on a text where one is given."""
    if dtype == "f32":
        return {"largest_logit_difference": check.same_tokens(model, artifact, directory, neutral.vocab, neutral.max_positions)}
    if text is None:
        return {}
    ids = AutoTokenizer.from_pretrained(source)(Path(text).read_text())["input_ids"]
    if len(ids) < ROWS * LENGTH:
        sys.exit(f"--text: {text} has {len(ids)} tokens; at least {ROWS * LENGTH} are needed")
    return vars(check.quality(model, artifact, ids[:MOST], ROWS, LENGTH))


def by_runtime(given, directory, source):
    """GGUF is measured by the engine that will run it: q4_K by llama.cpp, all else by candle, against the original in f32."""
    engine = "llamacpp" if directory.name == "gguf-q4_K" else "candle"
    command = [given.runtime, "quality", "--engine", engine, "--model", str(directory), "--text", given.text, "--tokens", str(MOST),
               "--reference", str(source), "--reference-engine", "candle", "--reference-dtype", "f32", "--output", "json"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"--runtime: {' '.join(command)}: {run.stderr.strip()}")
    found = json.loads(run.stdout)
    return {"tokens": found["tokens"], "perplexity": found["perplexity"], "original_perplexity": found["reference"]["perplexity"],
            "top1_accuracy": found["top1_accuracy"], "original_top1_accuracy": found["reference"]["top1_accuracy"],
            "top1_agreement": found["top1_agreement"]}


def told(entry, given, which=""):
    """Where a score that was measured here comes from."""
    text = f"next token right, {entry['tokens']} tokens of {Path(given.text).name}; perplexity {entry[which + 'perplexity']:.4f}"
    if not which:
        text += f" (original {entry['original_perplexity']:.4f}), best token as in the original {100 * entry['top1_agreement']:.1f} %"
    return text


def own_accuracy(entry, given):
    """A rounded artifact's own score, if the text gave one and the model's score is of the same kind."""
    if "top1_accuracy" not in entry or (given.accuracy is not None and not given.accuracy[1].startswith("next token right")):
        return None
    return f"{entry['top1_accuracy']:.4f}", told(entry, given)


def arguments():
    parser = argparse.ArgumentParser(prog="modelpack", description="Turn a Hugging Face model directory into artifacts for Joulecast's engines, check them, and write the InferenceModel that names them.")
    parser.add_argument("--model", required=True, metavar="DIR", help="directory with config.json, safetensors and the tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets one directory for each artifact, and inferencemodel.yaml")
    parser.add_argument("--artifacts", required=True, type=artifacts, metavar="LIST",
                        help="such as onnx:f32,onnx:int8,gguf:q8_0; " + "; ".join(f"{k}: {', '.join(v)}" for k, v in KINDS.items()))
    parser.add_argument("--name", type=object_name, default="model", help="name of the InferenceModel")
    parser.add_argument("--claim", default="models", help="PersistentVolumeClaim that the artifacts will lie on")
    parser.add_argument("--prefix", default="", help="directory on that volume")
    parser.add_argument("--accuracy", type=accuracy, metavar="SCORE=SOURCE", help="accuracy score and where it comes from; without it, and with --text, the share of the text's tokens that the model predicts, and for each rounded artifact its own")
    parser.add_argument("--text", metavar="FILE", help="a text of the model's own kind: perplexity and top-1 agreement of rounded artifacts are measured on it")
    parser.add_argument("--runtime", metavar="FILE", help="joulecast-runtime, to measure rounded GGUF artifacts on --text")
    parser.add_argument("--inline", action="store_true", help="weights inside model.onnx (for small models; a file may have 2 GB)")
    return parser.parse_args()


def artifacts(text):
    found = []
    for part in text.split(","):
        kind, _, dtype = part.partition(":")
        if dtype not in KINDS.get(kind, ()):
            raise argparse.ArgumentTypeError(f"{part!r} is none of " + ", ".join(f"{k}:{d}" for k, v in KINDS.items() for d in v))
        found.append((kind, dtype))
    return found


def object_name(text):
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a Kubernetes object: lower-case letters, digits, - and .")
    return text


def accuracy(text):
    score, _, source = text.partition("=")
    if not re.fullmatch(r"0(\.\d{1,9})?|1(\.0{1,9})?", score) or not source or '"' in source or "\\" in source:
        raise argparse.ArgumentTypeError(f"{text!r}: give a score from 0 to 1 and its source, such as 0.121=HumanEval pass@1")
    return score, source


try:
    main()
except (NotPacked, check.Differs) as problem:
    sys.exit(f"modelpack: {problem}")
