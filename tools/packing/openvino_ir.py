"""A decoder as OpenVINO IR with a KV cache, after the contract in docs/engines.md."""

import json

import numpy as np
import openvino as ov
import torch

from . import stepwise

DTYPES = ("f32", "f16")


def write(decoder, dtype, directory):
    """Writes model.xml, model.bin and joulecast.json. With f16 the matrices lie so in the file; OpenVINO computes in f32."""
    step = stepwise.Step(decoder).eval()
    with torch.no_grad():
        model = ov.convert_model(step, example_input=stepwise.example(decoder))
    dynamic = ov.Dimension()
    cache = ov.PartialShape([dynamic, decoder.kv_heads, dynamic, decoder.head_dim])
    shapes = [ov.PartialShape([dynamic, dynamic]), ov.PartialShape([dynamic])] + [cache] * (2 * len(decoder.blocks))
    names = ["input_ids", "lengths"] + stepwise.cache_names(decoder, "past_key_values")
    for port, name, shape in zip(model.inputs, names, shapes, strict=True):
        port.get_node().set_partial_shape(shape)
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits"] + stepwise.cache_names(decoder, "new"), strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    ov.save_model(model, directory / "model.xml", compress_to_fp16=dtype == "f16")
    description = stepwise.description(decoder, dtype, (directory / "model.bin").stat().st_size)
    (directory / "joulecast.json").write_text(json.dumps(description, indent=1) + "\n")


class OpenVinoModel:
    """An artifact with its cache; `step` appends one piece to every row."""

    def __init__(self, directory, decoder, rows):
        core = ov.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False, "NUM_STREAMS": 1}
        self.model = core.compile_model(core.read_model(directory / "model.xml"), "CPU", settings)
        self.rows, self.length, self.layers = rows, 0, len(decoder.blocks)
        # One masked position: no input may be empty.
        self.cache = [np.zeros((rows, decoder.kv_heads, 1, decoder.head_dim), np.float32) for _ in range(2 * self.layers)]

    def step(self, ids):
        """Logits (rows, vocabulary) after the last of ids (rows, tokens)."""
        ids = np.asarray(ids, np.int64)
        found = self.model([ids, np.full(self.rows, self.length, np.int64), *self.cache])
        new = [found[i + 1] for i in range(2 * self.layers)]
        self.cache = [np.concatenate([old[:, :, : self.length], part], 2) for old, part in zip(self.cache, new)]
        self.length += ids.shape[1]
        return found[0]
