"""What clients send to a server: steering in the wrong place is refused, all else comes through."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.serving.bodies import PlaceCheck
from common.serving.requests import steering_args

LOVE = steering_args("love", 3)
TOOL = {"function": {"parameters": {"properties": {"steering": {"type": "number"}}}}}


def answer(body: bytes, path: str, method: str = "POST", parts: int = 1) -> tuple[int, bytes]:
    """Return the status and what the server behind the check has read, or what was refused."""
    size = max(1, -(-len(body) // parts))
    pieces = [body[n : n + size] for n in range(0, len(body), size)] or [b""]
    sent: list[dict] = [
        {"type": "http.request", "body": piece, "more_body": n < len(pieces) - 1}
        for n, piece in enumerate(pieces)
    ] + [{"type": "http.disconnect"}]
    got: list[dict] = []

    async def receive() -> dict:
        return sent.pop(0)

    async def send(message: dict) -> None:
        got.append(message)

    async def server(scope: Any, receive: Any, send: Any) -> None:
        read, more = b"", True
        while more:
            message = await receive()
            read, more = read + message["body"], message["more_body"]
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": read})

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(PlaceCheck(server)(scope, receive, send))
    return got[0]["status"], got[1]["body"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/completions", LOVE, "expected 'steering' inside vllm_xargs, not beside it"),
        ("/v1/messages", {"steering_coeff": 2}, "expected 'steering_coeff' inside vllm_xargs"),
        ("/v1/completions", {"extra_body": {"vllm_xargs": LOVE}}, "not inside extra_body"),
        ("/v1/chat/completions", {"extra_body": LOVE}, "not inside extra_body"),
        ("/v1/completions", {"extra_args": LOVE}, "not inside extra_args"),
        ("/generative_scoring", {"vllm_xargs": LOVE}, "which /generative_scoring does not read"),
        ("/inference/v1/generate", {"vllm_xargs": LOVE}, "generate does not read"),
    ],
)
def test_steering_where_the_server_does_not_look_is_refused(path, body, says):
    given = json.dumps({"model": "m", "prompt": "I", **body}).encode()
    status, text = answer(given, path)
    assert status == 400 and says in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": LOVE},
        {"prompt": "steering"},
        {"tools": [TOOL], "messages": [{"role": "user", "content": "steering"}]},
        {"extra_body": {"other": 1}, "extra_args": None},
        ["steering"],
    ],
)
def test_what_is_in_its_place_comes_through(body):
    """Also words and tools that are called steering."""
    given = json.dumps(body).encode()
    assert answer(given, "/v1/chat/completions") == (200, given)


def test_token_ids_bring_steering_in_their_sampling_parameters():
    given = json.dumps({"token_ids": [5], "sampling_params": {"extra_args": LOVE}}).encode()
    assert answer(given, "/inference/v1/generate") == (200, given)


@given(st.binary(max_size=40).map(lambda odd: b'"steering"' + odd), st.integers(1, 9))
def test_any_body_comes_through_as_it_came(body, parts):
    """No JSON, in one part or in several."""
    assert answer(body, "/v1/completions", parts=parts) == (200, body)


def test_what_is_not_posted_is_not_read():
    assert answer(b'{"steering": 1}', "/health", method="GET") == (200, b'{"steering": 1}')
