"""A server of another engine, on the loopback address, for as long as a block is open."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

PATIENCE = 900  # seconds, for machines that are busy
FAREWELL = 60  # seconds in which a server may end by itself


@contextmanager
def server(
    command: Callable[[int], list[str]], log: Path, environment: Mapping[str, str]
) -> Iterator[str]:
    """Start a server, wait until it answers, and end it with the block.

    Args:
        command: returns the command for a port.
        log: where the server writes.
        environment: variables beside those of this process.

    Returns:
        Its address, such as http://127.0.0.1:8000.

    Raises:
        RuntimeError: it ended, or did not answer for a quarter of an hour; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        process = subprocess.Popen(
            command(port), stdout=out, stderr=out, env={**os.environ, **environment}
        )
    try:
        begun = time.monotonic()
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() - begun > PATIENCE:
                raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False
