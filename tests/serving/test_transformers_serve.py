"""`transformers serve` steers by checkpoints: a bias in each holds a vector. GPT-2 only."""

import copy
import importlib.util
import sys

import pytest
from support import PROMPTS

from benchmarks.servers import PATIENCE, server
from common.vectors.training import train_steering_vector
from repository.mechanisms import load_mechanism

NEEDS = ("accelerate", "fastapi", "uvicorn", "openai", "httpx")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDS),
        reason=f"not all of {', '.join(NEEDS)} are in this environment: `make engines` sets up one",
    ),
]
NEW = 16


def test_each_request_names_its_checkpoint(loaded, tmp_path):
    """Steered both ways and not at all, in turn, by one server: each text is transformers' own."""
    import httpx

    model, tokenizer, preset = loaded
    pair = [("Love", "Hate")]
    vector = train_steering_vector(model, tokenizer, pair, layers=[preset.layer]).unit()
    bias, wanted = load_mechanism("bias_editing"), {}
    for coeff in (preset.coeff, -preset.coeff, 0.0):
        wrapped = bias.wrap(copy.deepcopy(model), tokenizer)
        change = coeff * vector.layer_activations[preset.layer]
        with bias.steer(wrapped, preset.layer, change):
            wrapped.save_pretrained(tmp_path / f"{coeff:g}")
            tokenizer.save_pretrained(tmp_path / f"{coeff:g}")
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            with vector.apply(model, multiplier=coeff):
                ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            text = tokenizer.decode(ids[0], skip_special_tokens=True)
            wanted[f"{coeff:g}", prompt] = text.removeprefix(prompt)

    def command(port: int) -> list[str]:
        program = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
        return [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]

    with server(command, tmp_path / "serve.log", {"HF_HUB_OFFLINE": "1"}) as address:
        for _ in range(2):
            for (folder, prompt), text in wanted.items():
                asked = {"model": str(tmp_path / folder), "prompt": prompt, "max_tokens": NEW}
                answer = httpx.post(
                    f"{address}/v1/completions", json=asked | {"temperature": 0}, timeout=PATIENCE
                )
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == text, (folder, prompt)
    assert len(set(wanted.values())) > 2 * len(PROMPTS)
