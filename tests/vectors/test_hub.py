"""Vectors in folders with a card, here and on a hub: what goes there comes back."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import constants, errors

from common import SteeringVector

TENSORS = {2: torch.tensor([3.0, 4.0]), 5: torch.tensor([0.0, -1.5])}
METADATA = {"model": "someone/a-model", "model_type": "gpt2", "pairs": "12 | of\nmany"}


def a_vector(**changes) -> SteeringVector:
    return SteeringVector(**{"layer_activations": TENSORS, "metadata": METADATA, **changes})


def same(one: SteeringVector, other: SteeringVector) -> bool:
    return (
        one.layers == other.layers
        and one.layer_type == other.layer_type
        and METADATA.items() <= one.metadata.items()
        and all(map(torch.equal, one.layer_activations.values(), other.layer_activations.values()))
    )


def read_card(text: str) -> tuple[dict, str]:
    """What machines read, and what people read."""
    _, data, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(data), body


# --- folders ---


def test_a_folder_gives_the_vector_back(tmp_path):
    for layer_type in ("decoder_block", "mlp"):
        vector = a_vector(layer_type=layer_type)
        vector.save_folder(tmp_path / layer_type)
        assert same(SteeringVector.from_hub(tmp_path / layer_type), vector)
        assert same(SteeringVector.load(next((tmp_path / layer_type).glob("*.safe*"))), vector)


def test_a_card_says_what_the_vector_is(tmp_path):
    a_vector().save_folder(tmp_path / "love-hate")
    data, body = read_card((tmp_path / "love-hate" / "README.md").read_text(encoding="utf-8"))
    assert data["base_model"] == "someone/a-model" and "steering-vector" in data["tags"]
    assert body.startswith("\n\n# love-hate\n") and 'from_hub("love-hate")' in body.replace(
        "'", '"'
    )
    assert "| 2 | 2 | 5 |" in body and "| 5 | 2 | 1.5 |" in body
    assert r"| pairs | 12 \| of many |" in body
    a_vector(metadata={"model": "embedded"}).save_folder(tmp_path / "mine", card="# What I did")
    data, body = read_card((tmp_path / "mine" / "README.md").read_text(encoding="utf-8"))
    # It may be the name of a folder.
    assert "base_model" not in data and body == "\n\n# What I did\n"


def test_a_chosen_vector_is_used_as_it_was_chosen(tmp_path):
    """Its card stays in the file; an entry of the same name that is no card is one like others."""
    chosen = json.dumps({"format": "1", "place": {"layer": 2, "multiplier": 3.0412}})
    for number, (card, multiplier) in enumerate([(chosen, "3.041"), ("[]", "1.0"), ("a", "1.0")]):
        a_vector(metadata=METADATA | {"card": card}).save_folder(tmp_path / f"{number}")
        _, body = read_card((tmp_path / f"{number}" / "README.md").read_text(encoding="utf-8"))
        assert f"apply(model, multiplier={multiplier}):" in body
        assert ("| card |" in body) == (card != chosen) and "| pairs |" in body
        assert SteeringVector.from_hub(tmp_path / f"{number}").metadata["card"] == card


def test_nothing_that_was_saved_is_lost(tmp_path):
    """A vector or a card that is there is kept, and so is every other file."""
    folder = tmp_path / "v"
    a_vector().save_folder(folder)
    (folder / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"steering_vector\.safetensors and README\.md"):
        (-a_vector()).save_folder(folder)
    (folder / "steering_vector.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"has README\.md already"):
        (-a_vector()).save_folder(folder)
    assert not (folder / "steering_vector.safetensors").exists()
    (-a_vector()).save_folder(folder, overwrite=True)
    assert same(SteeringVector.from_hub(folder), -a_vector())
    assert (folder / "notes.txt").read_bytes() == before["notes.txt"]
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        SteeringVector.from_hub(folder, revision="v1")
    with pytest.raises(FileExistsError, match="is a file"):
        a_vector().save_folder(folder / "notes.txt", overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no file"):
        SteeringVector.from_hub(empty)


# --- a hub ---


class _Hub(BaseHTTPRequestHandler):
    """The part of the protocol of the Hub that makes a repository, writes to it, and reads it."""

    def log_message(self, *args):
        pass

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def say(self, **content) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repos, messages, tokens = self.server.repos, self.server.messages, self.server.tokens
        tokens.append(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            # The clients of several versions say it in two ways.
            hidden = given.get("private") or given.get("visibility") == "private"
            self.server.private[name] = hidden
            if name in repos:
                return self.answer(409, json.dumps({"url": f"/{name}"}).encode())
            repos[name] = {}
            return self.say(url=f"{self.server.address}/{name}")
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.say(errors=[], warnings=[])
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path).groups()
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            return self.say(files=modes)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                messages.append(line["value"]["summary"])
        address = f"{self.server.address}/{name}/commit/{'0' * 40}"
        return self.say(success=True, commitOid="0" * 40, commitUrl=address)

    def do_GET(self):
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        content = self.server.repos.get(found[1], {}).get(found[3]) if found else None
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        tag = f'"{hash(content):x}"'
        return self.answer(200, content, ETag=tag, X_Repo_Commit=f"{hash(content) % 10**40:040d}")

    do_HEAD = do_GET


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repos, server.messages, server.tokens, server.private = {}, [], [], {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")[2]
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.address}/{{repo_id}}{template}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_pushed_comes_back(served):
    """Through the client of the Hub, both ways; a new version takes the place of the old one."""
    vector = a_vector()
    address = vector.push_to_hub("me/love", token="a-token", private=True, commit_message="first")
    assert address.startswith(f"{served.address}/me/love/")
    assert sorted(served.repos["me/love"]) == ["README.md", "steering_vector.safetensors"]
    assert served.messages == ["first"] and served.private == {"me/love": True}
    assert set(served.tokens) == {"Bearer a-token"}
    data, body = read_card(served.repos["me/love"]["README.md"].decode())
    assert data["base_model"] == METADATA["model"] and "from_hub('me/love')" in body
    assert same(SteeringVector.from_hub("me/love"), vector)
    (-vector).push_to_hub("me/love", token="a-token")
    assert same(SteeringVector.from_hub("me/love"), -vector)


def test_a_card_that_was_written_there_stays(served):
    """Unless a new one is given."""
    vector = a_vector()
    vector.push_to_hub("me/love", token="a-token")
    served.repos["me/love"]["README.md"] = b"# My own words"
    (2.0 * vector).push_to_hub("me/love", token="a-token")
    assert served.repos["me/love"]["README.md"] == b"# My own words"
    vector.push_to_hub("me/love", "# Other words", token="a-token")
    assert served.repos["me/love"]["README.md"].decode().endswith("\n\n# Other words\n")


def test_what_the_hub_does_not_have_is_its_error(served):
    with pytest.raises(errors.EntryNotFoundError):
        SteeringVector.from_hub("me/nothing")
    with pytest.raises(ValueError, match="Repo id"):
        SteeringVector.from_hub("not a/repository/at all")
