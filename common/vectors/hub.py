"""Steering vectors in folders with a card, as the Hugging Face Hub keeps them."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData, hf_hub_download

from common.vectors import files
from common.vectors.layer_vectors import CARD

FILE, PAGE = "steering_vector.safetensors", "README.md"
TAGS = ["steering-vector", "activation-steering"]


def write_folder(
    path: str | os.PathLike, contents: files.Contents, card: str, overwrite: bool = False
) -> None:
    """Write a steering vector and its card to a folder; see `SteeringVector.save_folder`."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: expected a folder, or a new name")
    there = [name for name in (FILE, PAGE) if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{str(folder)!r} has {' and '.join(there)} already; give another name, or"
            " overwrite=True"
        )
    files.write_safetensors(folder / FILE, contents, overwrite)
    text = f"---\n{_card_data(contents)}\n---\n\n{card.strip()}\n"
    files.write_whole(folder / PAGE, overwrite, lambda name: _write(name, text))


def _write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


def push_folder(
    repo_id: str,
    contents: files.Contents,
    card: str | None,
    *,
    private: bool | None,
    token: str | bool | None,
    message: str,
) -> str:
    """Upload a steering vector; see `SteeringVector.push_to_hub`."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    keep = card is None and api.file_exists(repo_id, PAGE)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(folder, contents, default_card(contents, repo_id) if card is None else card)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=[PAGE] if keep else None,
            )
        )


def read_folder(
    name: str | os.PathLike, revision: str | None, token: str | bool | None
) -> files.Contents:
    """Read a steering vector from a folder or the Hub; see `SteeringVector.from_hub`."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{str(path)!r} is a folder, which has no revision {revision!r}: leave it out"
            )
        return files.read_safetensors(path / FILE)
    return files.read_safetensors(
        hf_hub_download(os.fspath(name), FILE, revision=revision, token=token)
    )


def default_card(contents: files.Contents, name: str) -> str:
    """Return what a card says where nobody wrote one: what the vector is, and how to use it."""
    layers, layer_type, metadata = contents
    model, multiplier = metadata.get("model"), _chosen_multiplier(metadata)
    if multiplier is not None:
        metadata = {key: value for key, value in metadata.items() if key != CARD}
    lines = [
        f"# {name.rpartition('/')[2]}",
        "",
        f"A steering vector{f' for {model}' if model else ''}: one vector for each of the layers"
        f" {', '.join(map(str, layers))}, added to the output of `{layer_type}`.",
        "",
        "```python",
        "from common import SteeringVector",
        "",
        f"vector = SteeringVector.from_hub({name!r})",
        f"with vector.apply(model, multiplier={multiplier or '1.0'}):",
        "    model.generate(**inputs)",
        "```",
        "",
        "| layer | numbers | length |",
        "| --- | --- | --- |",
        *(
            f"| {layer} | {len(vector)} | {vector.detach().double().norm().item():.4g} |"
            for layer, vector in layers.items()
        ),
    ]
    if metadata:
        rows = [f"| {key} | {_cell(value)} |" for key, value in sorted(metadata.items())]
        lines += ["", "| made with | |", "| --- | --- |", *rows]
    return "\n".join(lines)


def _chosen_multiplier(metadata: Mapping[str, str]) -> str | None:
    """The multiplier that `choose` chose; None where a vector was not chosen."""
    try:
        return f"{json.loads(metadata[CARD])['place']['multiplier']:.4g}"
    except (KeyError, TypeError, ValueError):
        return None


def _cell(value: str) -> str:
    """A text in a table of Markdown."""
    return " ".join(str(value).split()).replace("|", r"\|")


def _card_data(contents: files.Contents) -> str:
    """What machines read in a card."""
    model = contents.metadata.get("model", "")
    base = model if model.count("/") == 1 else None  # a name without owner may be a folder
    return ModelCardData(base_model=base, tags=TAGS).to_yaml()
