"""The peers in their own environment, asked from here; `peer_server` answers there."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

SERVER = Path(__file__).with_name("peer_server.py")


class Peer:
    """The peers in their own environment, waiting to be told what to time."""

    def __init__(self, python: str, folder: Path):
        self.vectors = folder / "vectors.safetensors"
        command = [python, str(SERVER), str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._answer()

    def ask(self, case: dict[str, Any]) -> Any:
        """Let it do one job (see `peer_server`), and return its answer."""
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the environment of the peers does not work: see its message above")
        return json.loads(line)

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()
