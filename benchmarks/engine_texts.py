"""Do other engines write what transformers writes? Love - Hate, the embedded model, greedy.

    python -m benchmarks.engine_texts

in the environment of `make engines`. Three prompts, unsteered, with the coefficient of the preset
and with its negative, in each of these ways:

- transformers, the vector applied by a hook: the others are compared with it;
- transformers serve, which loads checkpoints whose bias holds the vector;
- vLLM, all nine requests in one batch, each with its own coefficient; and with such checkpoints;
- llama.cpp, the vector as a control vector; and with such checkpoints as GGUF.

It prints a table, and writes the part "texts" of `results/engines.json`: how many texts are equal
token by token (`transformers serve` gives no tokens: letter by letter), and the largest difference
of a log-probability of their tokens.
"""

import argparse
import copy
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from benchmarks.servers import PATIENCE, server
from benchmarks.stored import machine, machine_line, store_part
from common.loading import load_model
from common.serving.gguf_model import save_model_gguf
from common.serving.llama_cpp import steer_llama_cpp
from common.serving.requests import steering_args
from common.serving.vllm_plugin import vllm_package
from common.vectors.training import train_steering_vector
from repository.agreement import PROMPTS
from repository.mechanisms import load_mechanism

NEW = 40  # tokens of a text, or fewer where the model ends it
SIGNS = {"unsteered": 0, "+": 1, "-": -1}
MATCHING = "the same vector"


class Text(NamedTuple):
    """What an engine wrote after a prompt; a server that gives no tokens leaves None."""

    text: str
    tokens: list[int] | None = None
    logprobs: list[float] | None = None

    def equals(self, other: "Text") -> bool:
        """Say whether the tokens are the same, or the texts where there are no tokens."""
        if self.tokens is None or other.tokens is None:
            return self.text == other.text
        return self.tokens == other.tokens


Texts = dict[str, list[Text]]  # by sign, one for each of `PROMPTS`


class Subject:
    """The embedded model, the vector that steers it, and both as files.

    Args:
        folder: where the files are written.
    """

    def __init__(self, folder: Path):
        self.model, self.tokenizer, self.preset = load_model("embedded", device="cpu")
        self.folder = folder
        self.ids = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        self.end = self.tokenizer.eos_token_id
        pair = [("Love", "Hate")]
        trained = train_steering_vector(
            self.model, self.tokenizer, pair, layers=[self.preset.layer]
        )
        self.vector = trained.unit()
        self.vector.save(folder / "love.safetensors")
        editing = load_mechanism("bias_editing")
        for sign, factor in SIGNS.items():
            wrapped = editing.wrap(copy.deepcopy(self.model), self.tokenizer)
            change = factor * self.preset.coeff * self.vector.layer_activations[self.preset.layer]
            around = editing.steer(wrapped, self.preset.layer, change) if factor else nullcontext()
            with around:
                wrapped.save_pretrained(self.checkpoint(sign))
                self.tokenizer.save_pretrained(self.checkpoint(sign))
                save_model_gguf(wrapped, self.tokenizer, self.gguf(sign))

    def checkpoint(self, sign: str) -> Path:
        """A folder: the model with the vector in a bias, or as it is."""
        return self.folder / f"model {sign}"

    def gguf(self, sign: str) -> Path:
        """The same for llama.cpp."""
        return self.folder / f"model {sign}.gguf"

    def text(self, tokens: Sequence[int], logprobs: Sequence[float]) -> Text:
        """Return a text without what follows its end."""
        length = list(tokens).index(self.end) if self.end in tokens else len(tokens)
        kept = list(tokens[:length])
        return Text(self.tokenizer.decode(kept), kept, list(logprobs[:length]))


def by_transformers(subject: Subject) -> Texts:
    """`generate` under `SteeringVector.apply`."""
    return {
        sign: _generated(subject, subject.model, factor * subject.preset.coeff)
        for sign, factor in SIGNS.items()
    }


@torch.no_grad()
def _generated(subject: Subject, model: PreTrainedModel, coeff: float) -> list[Text]:
    found = []
    with subject.vector.apply(model, multiplier=coeff):
        for ids in subject.ids:
            given = torch.tensor([ids])
            mask = torch.ones_like(given)
            whole = model.generate(given, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
            new = whole[0, len(ids) :]
            scores = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            found.append(subject.text(new.tolist(), scores[range(len(new)), new].tolist()))
    return found


def by_transformers_serve(subject: Subject) -> Texts:
    """A server that loads the checkpoint which a request names."""

    def command(port: int) -> list[str]:
        program = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
        return [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]

    with server(command, subject.folder / "serve.log", {"HF_HUB_OFFLINE": "1"}) as address:
        return {
            sign: [_asked(subject, address, sign, prompt) for prompt in PROMPTS] for sign in SIGNS
        }


def _asked(subject: Subject, address: str, sign: str, prompt: str) -> Text:
    asked = {
        "model": f"{subject.checkpoint(sign)}",
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
    }
    request = Request(
        f"{address}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=PATIENCE) as answer:
        return Text(json.load(answer)["choices"][0]["text"])


@contextmanager
def _vllm(folder: Path, **options: Any) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(
        f"{folder}",
        dtype="float32",
        enforce_eager=True,
        async_scheduling=False,
        gpu_memory_utilization=0.2,
        max_model_len=128,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _vllm_texts(subject: Subject, llm: Any, coeffs: Sequence[float]) -> list[Text]:
    """Return a text for each coefficient and prompt, of one batch; 0 asks for no steering."""
    from vllm import SamplingParams

    params, prompts = [], []
    for coeff in coeffs:
        for ids in subject.ids:
            extra = steering_args("love", coeff) if coeff else None
            params.append(
                SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, extra_args=extra)
            )
            prompts.append({"prompt_token_ids": ids})
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        (one,) = output.outputs
        logprobs = [
            place[token].logprob for token, place in zip(one.token_ids, one.logprobs, strict=True)
        ]
        found.append(subject.text(one.token_ids, logprobs))
    return found


def by_vllm(subject: Subject) -> Texts:
    """The nine requests in one batch."""
    steering = {"vectors": {"love": f"{subject.folder / 'love.safetensors'}"}}
    steering["max_coeff"] = 2 * subject.preset.coeff
    coeffs = [factor * subject.preset.coeff for factor in SIGNS.values()]
    with _vllm(subject.checkpoint("unsteered"), additional_config={"steering": steering}) as llm:
        texts = _vllm_texts(subject, llm, coeffs)
    return _by_sign(texts)


def by_vllm_checkpoint(subject: Subject) -> Texts:
    """Plain vLLM, without any of our code, on checkpoints with an edited bias."""
    found = {}
    for sign in SIGNS:
        with _vllm(subject.checkpoint(sign)) as llm:
            found[sign] = _vllm_texts(subject, llm, [0])
    return found


def _by_sign(texts: Sequence[Text]) -> Texts:
    count = len(PROMPTS)
    return {
        sign: list(texts[place * count : (place + 1) * count]) for place, sign in enumerate(SIGNS)
    }


def _llama(path: Path) -> Any:
    import llama_cpp

    # In float32 throughout, as the others: by default llama.cpp keeps keys and values in 16 bits.
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(
        f"{path}", n_ctx=128, logits_all=True, flash_attn=False, verbose=False, **kinds
    )


def _llama_texts(subject: Subject, llama: Any) -> list[Text]:
    found = []
    for ids in subject.ids:
        llama.reset()
        tokens: list[int] = []
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            if token == subject.end or len(tokens) == NEW:
                break
        scores = torch.from_numpy(np.array(llama.scores[len(ids) - 1 :][: len(tokens)]))
        logprobs = scores.log_softmax(-1)[range(len(tokens)), tokens].tolist()
        found.append(subject.text(tokens, logprobs))
    return found


def by_llama_cpp(subject: Subject) -> Texts:
    """The vector as a control vector."""
    llama, found = _llama(subject.gguf("unsteered")), {}
    for sign, factor in SIGNS.items():
        with steer_llama_cpp(llama, subject.vector, factor * subject.preset.coeff):
            found[sign] = _llama_texts(subject, llama)
    return found


def by_llama_cpp_checkpoint(subject: Subject) -> Texts:
    """Models with an edited bias, and no control vector."""
    return {sign: _llama_texts(subject, _llama(subject.gguf(sign))) for sign in SIGNS}


WAYS: dict[tuple[str, str], Callable[[Subject], Texts]] = {
    ("transformers serve", "edited bias"): by_transformers_serve,
    ("vLLM", MATCHING): by_vllm,
    ("vLLM", "edited bias"): by_vllm_checkpoint,
    ("llama.cpp", MATCHING): by_llama_cpp,
    ("llama.cpp", "edited bias"): by_llama_cpp_checkpoint,
}


def compared(found: Texts, wanted: Texts) -> dict[str, Any]:
    """Return how many texts are equal, and how far the log-probabilities of those differ.

    Args:
        found: of an engine.
        wanted: of transformers.
    """
    pairs = [pair for sign in SIGNS for pair in zip(found[sign], wanted[sign], strict=True)]
    equal = [(mine, theirs) for mine, theirs in pairs if mine.equals(theirs)]
    gaps = [
        abs(a - b)
        for mine, theirs in equal
        if mine.logprobs is not None and theirs.logprobs is not None
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True)
    ]
    return {
        "equal": len(equal),
        "texts": len(pairs),
        "largest difference": max(gaps) if gaps else None,
    }


def texts_table(results: dict[str, Any]) -> pd.DataFrame:
    """Return the stored comparison, a row for each way."""
    rows = results["rows"]
    gaps = [row["largest difference"] for row in rows]
    return pd.DataFrame(
        {
            "engine": [row["engine"] for row in rows],
            "steered by": [row["steered by"] for row in rows],
            "texts equal": [f"{row['equal']} of {row['texts']}" for row in rows],
            "log-probabilities within": ["-" if gap is None else f"{gap:.0e}" for gap in gaps],
        }
    )


def main() -> None:
    """Run the command."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # vLLM compiles how it ranks probabilities, also in eager mode: slow, and for a few tokens.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        subject = Subject(Path(name))
        wanted = by_transformers(subject)
        rows = [
            {"engine": engine, "steered by": how, **compared(way(subject), wanted)}
            for (engine, how), way in WAYS.items()
        ]
    results = {
        "measured": datetime.date.today().isoformat(),
        "machine": machine(vllm_package(), "llama-cpp-python"),
        "layer": subject.preset.layer,
        "coeff": subject.preset.coeff,
        "rows": rows,
        "texts": {
            prompt: {sign: wanted[sign][n].text for sign in SIGNS}
            for n, prompt in enumerate(PROMPTS)
        },
    }
    print(texts_table(results).to_string(index=False))
    print(machine_line(results))
    store_part("texts", results, {}, "engines")


if __name__ == "__main__":
    main()
