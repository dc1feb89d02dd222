"""Compares an artifact, run by its own library, with the model that it was made of, run by transformers in float32."""

import random
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch

# A step whose two best logits are this close may go either way: implementations sum in different orders.
EXCUSED_MARGIN = 1e-4
# Largest difference of a logit that summing in another order explains, relative to the spread of all logits.
LOGIT_TOLERANCE = 1e-4
PROMPT_LENGTHS = (1, 2, 7, 33, 96)
STEPS = 24


class Differs(Exception):
    """The artifact does not compute what the model computes."""


@dataclass
class Quality:
    """How an artifact's predictions compare with those of the original, over the tokens of a text."""

    tokens: int
    perplexity: float
    original_perplexity: float
    top1_accuracy: float
    original_top1_accuracy: float
    top1_agreement: float


class OnnxModel:
    """An artifact with its cache; `step` appends one piece to every row."""

    def __init__(self, path, rows, context):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.positions = any(i.name == "position_ids" for i in self.session.get_inputs())
        self.length, self.rows = 0, rows
        self.cache = {}
        for given in self.session.get_inputs():
            if given.name.startswith("past_key_values."):
                shape = (rows, given.shape[1], context, given.shape[3])
                self.cache[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def step(self, ids):
        """Logits (rows, vocabulary) after the last of ids (rows, tokens)."""
        ids = np.asarray(ids, np.int64)
        start, self.length = self.length, self.length + ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((self.rows, self.length), np.int64))
        if self.positions:
            binding.bind_cpu_input("position_ids", np.tile(np.arange(start, self.length), (self.rows, 1)))
        binding.bind_output("logits")
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[:, -1]


@torch.no_grad()
def same_tokens(model, artifact, path, vocab, context):
    """Greedy tokens and logits of random prompts; gives the largest difference relative to the logits' spread.

    `artifact(rows, length)` gives the artifact at `path` with an empty cache of so many rows and positions.
    """
    worst = 0.0
    rng = random.Random(1)
    for length in (n for n in PROMPT_LENGTHS if n + STEPS <= context):
        ids = [rng.randrange(vocab) for _ in range(length)]
        mine = artifact(1, length + STEPS)
        logits, piece, cache = None, ids, None
        for step in range(STEPS):
            out = model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            want = out.logits[0, -1].float().numpy()
            logits = mine.step([piece])[0]
            error = float(np.abs(logits - want).max() / want.std())
            worst = max(worst, error)
            if error > LOGIT_TOLERANCE:
                raise Differs(f"{path}: prompt of {length} tokens, step {step}: a logit differs by {error:.2e} of their spread")
            best = np.sort(want)[-2:]
            token = int(want.argmax())
            if int(logits.argmax()) != token and best[1] - best[0] > EXCUSED_MARGIN:
                raise Differs(f"{path}: prompt of {length} tokens, step {step}: token {int(logits.argmax())}, not {token}")
            piece = [token]
    return worst


def rows_apart(artifact, path, vocab):
    """Rows of different lengths in one step: each must get the logits that it gets alone. Gives the largest difference."""
    rng = random.Random(2)
    prompts = [[rng.randrange(vocab) for _ in range(length)] for length in (3, 17, 1)]
    following = [[rng.randrange(vocab) for _ in prompts] for _ in range(4)]
    together = artifact(len(prompts), 32)
    for row, prompt in enumerate(prompts):
        together.step([prompt], slice(row, row + 1))
    got = [together.step(np.array(tokens)[:, None]) for tokens in following]
    worst = 0.0
    for row, prompt in enumerate(prompts):
        alone = artifact(1, 32)
        alone.step([prompt])
        for step, tokens in enumerate(following):
            want = alone.step([[tokens[row]]])[0]
            error = float(np.abs(got[step][row] - want).max() / want.std())
            worst = max(worst, error)
            if error > LOGIT_TOLERANCE:
                raise Differs(f"{path}: row {row} among others, step {step}: a logit differs by {error:.2e} of their spread")
    return worst


@torch.no_grad()
def quality(model, artifact, ids, rows, length):
    """Both models over the segments of `length` tokens of a text, `rows` of them at once; `artifact(rows, length)` gives one with an empty cache."""
    segments = np.array(ids[: len(ids) // length * length]).reshape(-1, length)
    loss = own_loss = 0.0
    agree = count = right = own_right = 0
    for group in (segments[at : at + rows] for at in range(0, len(segments), rows)):
        want = model(torch.tensor(group)).logits.float().numpy()
        mine = artifact(len(group), length)
        for at in range(length - 1):
            got = mine.step(np.asarray(group[:, at : at + 1]))
            for row in range(len(group)):
                following = group[row, at + 1]
                loss -= log_probability(got[row], following)
                own_loss -= log_probability(want[row, at], following)
                best, own_best = got[row].argmax(), want[row, at].argmax()
                agree += int(best == own_best)
                right += int(best == following)
                own_right += int(own_best == following)
                count += 1
    return Quality(count, float(np.exp(loss / count)), float(np.exp(own_loss / count)), right / count, own_right / count, agree / count)


def log_probability(logits, token):
    logits = logits.astype(np.float64)
    peak = logits.max()
    return logits[token] - peak - np.log(np.exp(logits - peak).sum())
