"""What a server is sent: steering that is asked for in a place where it does not look is refused.

Servers ignore fields that they do not know. The text would be unsteered, and look like any other.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from common.serving.requests import is_ours

# Mappings of other interfaces: that of the OpenAI client, and that of `SamplingParams`.
FOREIGN = ("extra_body", "extra_args")
# Paths that do not read vllm_xargs.
WITHOUT = ("/generative_scoring", "/inference/v1/generate")


def misplaced(body: Mapping[str, Any], path: str = "") -> str | None:
    """Return what asks for steering where a server does not look, or None.

    Args:
        body: what a client sends.
        path: to which path of the server, for example "/v1/completions".
    """
    for key, value in body.items():
        if is_ours(key):
            return f"expected {key!r} inside vllm_xargs, not beside it"
        is_read_elsewhere = key == "vllm_xargs" and path.endswith(WITHOUT)
        if (key in FOREIGN or is_read_elsewhere) and _asks(value):
            where = f"{key}, which {path or 'a server'} does not read"
            return f"expected steering inside vllm_xargs of a completion, not inside {where}"
    return None


def _asks(value: Any) -> bool:
    """Say whether a mapping asks for steering, itself or in one that it holds."""
    return isinstance(value, Mapping) and any(
        is_ours(key) or _asks(inner) for key, inner in value.items()
    )


class PlaceCheck:
    """Answers with status 400 what asks for steering in the wrong place; an ASGI middleware.

    Source: https://asgi.readthedocs.io/en/latest/specs/www.html for the messages.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        """Read what a client sends, and hand it on as it came."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages, more = [], True
        while more:
            messages.append(await receive())
            more = messages[-1].get("more_body", False)
        body = b"".join(message.get("body", b"") for message in messages)
        if wrong := _misplaced_in(body, scope["path"]):
            await _refuse(wrong, send)
            return

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


def _misplaced_in(body: bytes, path: str) -> str | None:
    if b"steering" not in body:
        return None
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):  # the server says so
        return None
    return misplaced(given, path) if isinstance(given, dict) else None


async def _refuse(message: str, send: Callable) -> None:
    """Answer as vLLM does when it refuses a request."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
