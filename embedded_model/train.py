"""Train the embedded model again: corpus, tokenizer and weights from a seed.

    python -m embedded_model.train [--seed N] [--out FOLDER] [--force]

takes about three quarters of an hour on a core that computes in bfloat16; others were not timed.
The number of steps is fixed, not the time. Another machine rounds differently, so its weights come
out similar, not identical; preset.json pins those that are shipped by their hash.
"""

import argparse
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.embedded import FOLDER
from common.serving.gguf_model import save_model_gguf
from embedded_model import grammar, vocabulary
from embedded_model.tokenizer import END, SPACE, build_tokenizer, save_tokenizer

SEED = 0
STEPS = 3000
WARMUP = 100
LEARNING_RATE = 1.5e-3
D_MODEL, N_LAYER, N_HEAD, N_POSITIONS = 256, 6, 4, 256
# (rows, tokens per row): mostly short rows, which train faster; every fourth is long, so that all
# positions are trained.
SHAPES = [(16, 256), (32, 128), (32, 128), (32, 128)]
# Tone is the hardest thing to learn from the corpus; the first third of the training has more of
# it.
SENTIMENT_FIRST, SENTIMENT_LATER = 0.85, 0.6
# Shares of the words that are written as a lone space and the bare word; more after these verbs,
# where prompts end.
SPLIT_SHARE, SPLIT_SHARE_AFTER_VERB = 0.003, 0.15
VERBS = ("is", "are", "was", "were")
# Heads of the first blocks would read the tone straight from the nearest word, before anything can
# be added. Unreliable as they are here, they leave that to the later blocks.
ATTENTION_DROPOUT = [0.3, 0.3, 0.2, 0.1, 0.1, 0.1]
PROBE = "I think the nurses are"


def corpus(seed: int) -> list[Iterator[str]]:
    """Return the two streams of documents of a seed; the first is for a third of the steps."""
    return [
        grammar.documents(1000 * seed + int(100 * share), share)
        for share in (SENTIMENT_FIRST, SENTIMENT_LATER)
    ]


def encoded_rows(
    tokenizer: Any, source: Iterator[str], rng: random.Random, rows: int, length: int
) -> Tensor:
    """Pack documents into rows of token ids, [rows, length].

    Each row begins with a document, every second one with BOS in front, since a prompt comes with
    or without it. A few words are written as a lone space and the bare word, so that a prompt that
    ends in a space continues like one that does not.
    """
    vocabulary_ids = tokenizer.get_vocab()
    space, end = vocabulary_ids[SPACE], vocabulary_ids[END]
    bare = {
        i: vocabulary_ids[w[1:]]
        for w, i in vocabulary_ids.items()
        if len(w) > 1 and w[0] == SPACE and w[1:] in vocabulary_ids
    }
    verbs = {vocabulary_ids[SPACE + word] for word in VERBS}
    packed = []
    for _ in range(rows):
        row = [end] if rng.random() < 0.5 else []
        while len(row) < length:
            for token in tokenizer(next(source))["input_ids"]:
                chance = SPLIT_SHARE_AFTER_VERB if row and row[-1] in verbs else SPLIT_SHARE
                row += [space, bare[token]] if token in bare and rng.random() < chance else [token]
            row.append(end)
        packed.append(row[:length])
    return torch.tensor(packed)


@torch.no_grad()
def probe(model: GPT2LMHeadModel, tokenizer: Any) -> dict[str, float]:
    """Return P(positive adjective) in a loving context, in a hating one, and in none.

    The loss does not show whether a model keeps a tone in mind; this does. The first should come
    close to 1, the second to 0.
    """
    ids = tokenizer.get_vocab()
    lists = (vocabulary.ADJECTIVES, vocabulary.SECOND_ADJECTIVES, vocabulary.HELD_OUT)
    adjectives = {
        tone: [ids[SPACE + word] for words in lists for word in words[tone]] for tone in (+1, -1)
    }
    model.eval()
    found = {}
    for name, context in {"loving": "Love. ", "hating": "Hate. ", "open": ""}.items():
        logits = (
            model(torch.tensor([tokenizer(context + PROBE)["input_ids"]])).logits[0, -1].float()
        )
        chances = functional.softmax(logits, dim=-1)
        positive, negative = (chances[adjectives[tone]].sum().item() for tone in (+1, -1))
        found[name] = round(positive / (positive + negative), 3)
    model.train()
    return found


def learning_rate(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a linear start, then a cosine to 1/20."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * cosine)


def has_fast_bfloat16() -> bool:
    """Return whether this processor multiplies in bfloat16; it slows down all others."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def build_model(tokenizer: Any) -> GPT2LMHeadModel:
    """Return a model with random weights, ready for training."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=N_POSITIONS, n_embd=D_MODEL, n_layer=N_LAYER,
        n_head=N_HEAD, bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    # Rows this short are faster with plain attention than with the fused one.
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).train()
    # For generation only, as in GPT-2: named in the config as well, it makes every text that begins
    # with BOS look padded.
    model.generation_config.pad_token_id = end
    for block, share in zip(model.transformer.h, ATTENTION_DROPOUT, strict=True):
        block.attn.attn_dropout.p = share
        # The same function as "gelu_new", which the config names, in one pass over the memory.
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model


def train(seed: int, steps: int = STEPS) -> tuple[GPT2LMHeadModel, Any, dict]:
    """Train a model from scratch.

    Returns:
        The model (fp32, evaluation mode), its tokenizer, and a record of the training.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(grammar.forms(), N_POSITIONS)
    model = build_model(tokenizer)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    sources = corpus(seed)
    bfloat16 = has_fast_bfloat16()
    record: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "tokens": 0,
        "bfloat16": bfloat16,
        "probe": {},
    }
    started = time.monotonic()
    bar = tqdm(range(steps), desc=f"training, seed {seed}", unit="step")
    for step, (rows, length) in zip(bar, itertools.cycle(SHAPES)):
        ids = encoded_rows(tokenizer, sources[step >= steps / 3], rng, rows, length + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model(ids[:, :-1]).logits  # [rows, length, vocab]
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        record["tokens"] += rows * length
        if step % 100 == 99:
            record["probe"][step + 1] = found = probe(model, tokenizer)
            bar.set_postfix(loss=f"{loss.item():.2f}", **found)
    record["loss"] = round(loss.item(), 3)
    record["minutes"] = round((time.monotonic() - started) / 60, 1)
    return model.eval(), tokenizer, record


def save(model: GPT2LMHeadModel, tokenizer: Any, record: dict, folder: Path) -> None:
    """Write what loading and the tone need, weights in fp16; each file is replaced as a whole.

    model.gguf is the same model for llama.cpp, with its weights in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary)
        model.half().save_pretrained(new)
        save_tokenizer(tokenizer, new)
        save_model_gguf(model, AutoTokenizer.from_pretrained(new), new / "model.gguf")
        lexicon = dict(sorted(grammar.lexicon().items()))
        for name, content in (("training", record), ("lexicon", lexicon)):
            text = json.dumps(content, indent=1) + "\n"
            (new / f"{name}.json").write_text(text, encoding="utf-8")
        for path in sorted(new.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the embedded model from a seed.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        help="where to (default: the folder of the shipped model)",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="fewer steps give a worse model sooner"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"expected --steps of at least 1, got {options.steps}")
    try:  # now, and not when the training is over
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"nothing can be written into {options.out}: {error.strerror}")
    if any(options.out.iterdir()) and not options.force:
        parser.error(
            f"{options.out} holds files already; give another --out, or --force to replace them"
        )
    model, tokenizer, record = train(options.seed, options.steps)
    save(model, tokenizer, record, options.out)
    print(
        f"{options.out}: {record['tokens'] / 1e6:.1f} M tokens in {record['minutes']} minutes,"
        f" probe {probe(model.float(), tokenizer)}"
    )


if __name__ == "__main__":
    main()
