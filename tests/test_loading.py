"""Loading: which model is meant, what is refused and how, and what a loaded model is like."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, T5Config

from common import embedded
from common import loading as models
from common.loading import VARIABLE, LoadError, copy_sharing_weights, load_model, preset_for
from common.places.blocks import get_block
from repository.mechanisms import ROOT

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test may reach the hub, find what a reader has downloaded, or read a reader's settings."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        models, "try_to_load_from_cache", _nothing_downloaded(models.try_to_load_from_cache)
    )


def _nothing_downloaded(look_up: Callable) -> Callable:
    return lambda name, file: look_up(name, file, cache_dir=os.devnull)


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A local folder with a tiny GPT-2 of random weights."""
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(tokenizer), **ends
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def refusal(name: str | Path, **options: object) -> str:
    """Load what cannot be loaded and return the message: one line, without a traceback."""
    with pytest.raises(LoadError) as caught:
        load_model(str(name), **options)
    error, message = caught.value, str(caught.value)
    assert error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)
    assert message and "\n" not in message and "Traceback" not in message and len(message) < 500
    return message


# What is loaded.


def test_embedded_is_the_default(capsys):
    """Without argument or variable: the embedded model, ready to use, and two lines that say so."""
    model, tokenizer, preset = load_model()
    assert model.name_or_path == str(embedded.FOLDER)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {
        torch.float32
    }
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == tokenizer.eos_token
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert 0 <= preset.layer < model.config.num_hidden_layers and preset.coeff > 0
    out, err = capsys.readouterr()
    assert [len(line) <= 100 for line in out.splitlines()] == [True] * 2 and not err
    assert (
        out.startswith("Loaded the embedded model: GPT2LMHeadModel, ")
        and "load_model('gpt2-xl')" in out
        and VARIABLE in out
    )


def test_variable_is_used_and_the_argument_wins(folder, monkeypatch, capsys):
    """`STEERING_MODEL` replaces the default; an argument wins over it; an empty one is none."""
    monkeypatch.setenv(VARIABLE, str(folder))
    assert load_model().model.config.hidden_size == 16
    assert (
        f"Loaded {folder}: GPT2LMHeadModel, 2 blocks x 16, float32 on " in capsys.readouterr().out
    )
    assert load_model("embedded").model.name_or_path == str(embedded.FOLDER)
    monkeypatch.setenv(VARIABLE, "")
    assert load_model().model.name_or_path == str(embedded.FOLDER)


def test_colab_takes_gpt2_xl(monkeypatch):
    """On Colab the default is GPT2-XL, and the variable still goes before it."""
    monkeypatch.setattr(models, "on_colab", lambda: True)
    with pytest.raises(LoadError, match="'gpt2-xl'"):
        load_model()
    monkeypatch.setenv(VARIABLE, "embedded")
    assert load_model().model.name_or_path == str(embedded.FOLDER)


def test_local_folder(folder):
    """A folder gives its own weights, in evaluation mode, padded on the left, in a given dtype."""
    model, tokenizer, preset = load_model(str(folder), dtype=torch.bfloat16)
    assert torch.equal(
        model.transformer.wpe.weight,
        GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16).transformer.wpe.weight,
    )
    assert model.dtype == torch.bfloat16 and not model.training and tokenizer.padding_side == "left"
    assert preset == preset_for(str(folder), 2)


def test_tokenizer_without_padding_gets_one(folder):
    """Where a tokenizer knows no padding token, as GPT-2's, it pads with the end of text."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    model, tokenizer, _ = load_model(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_presets(loaded):
    """GPT2-XL has the published preset by both names, the embedded one its own, others a guess."""
    for name in ("gpt2-xl", "openai-community/gpt2-xl"):
        assert preset_for(name, 48)[:2] == (5, 10.0)
    stored = json.loads((embedded.FOLDER / "preset.json").read_text())
    assert loaded.preset[:2] == (stored["layer"], stored["coeff"])
    for blocks in (1, 2, 12, 48, 80):
        preset = preset_for("somebody/model", blocks)
        assert 0 <= preset.layer < blocks and "guess" in preset.source


# What is refused.


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~missing", "a/b/c"])
def test_missing_folder(name):
    """What can only be a folder, and is none, is said to be missing."""
    assert refusal(name).startswith(f"there is no folder {name}")


@pytest.mark.parametrize("name", ["no model", "-name", "a--b", "name!", "a/b.git"])
def test_impossible_name(name):
    """What can be neither a folder nor a hub id is called no model, without asking the hub."""
    assert refusal(name).startswith(f"{name!r} is not a model")


def test_folder_without_config(tmp_path):
    """A folder without config.json holds no model."""
    assert "it has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"model_type": "no_such_type"}',
        '{"model_type": "gpt2", "n_embd": "wide"}',
    ],
)
def test_damaged_config(folder, text):
    """A config.json that cannot be read, or says nothing, is named."""
    (folder / CONFIG).write_text(text)
    assert str(folder) in refusal(folder)


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def _other_shapes(folder: Path) -> None:
    save_file(
        {"transformer.wte.weight": torch.zeros(3, 3)}, folder / WEIGHTS, metadata={"format": "pt"}
    )


def _drop_a_tensor(folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    weights = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "h.1.mlp" not in name and "lm_head" not in name
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing weights": lambda folder: (folder / WEIGHTS).unlink(),
    "empty weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "truncated weights": _truncate,
    "no safetensors": (
        lambda folder: (folder / WEIGHTS).write_bytes(
            b"version https://git-lfs.github.com/spec/v1\n"
        )
    ),
    "weights of another shape": _other_shapes,
    "weights that are not all there": _drop_a_tensor,
    "missing tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "damaged tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder(folder, damage):
    """Weights or a tokenizer that are missing, damaged or another model's: one sentence refuses."""
    DAMAGES[damage](folder)
    assert refusal(folder).startswith(f"{str(folder)!r} cannot be loaded")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (
            GPT2Config(architectures=["GPT2ForSequenceClassification"]),
            "GPT2ForSequenceClassification",
        ),
        (T5Config(), "t5"),
    ],
)
def test_no_causal_language_model(tmp_path, config, kind):
    """A model that cannot continue a text is refused by its kind, before any weights are read."""
    config.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "is not a causal language model" in message and kind in message


def test_too_little_memory(tmp_path):
    """A model larger than the free memory is refused before it is read, and its need is named."""
    config = GPT2Config(n_layer=96, n_embd=2**17, n_head=64, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    needed = 96 * 12 * 2**34 * 4 / 1e9  # the blocks' matrices, fp32
    message = refusal(tmp_path)
    found = float(message.split(" needs ")[1].split(" GB of memory")[0])
    assert needed < found < 1.02 * needed and "GB are free on " in message


def test_memory_counts_in_the_dtype(folder, monkeypatch):
    """What fits in bf16 and not in fp32 is loaded in bf16 and refused in fp32."""
    parameters = sum(
        parameter.numel() for parameter in GPT2LMHeadModel.from_pretrained(folder).parameters()
    )
    monkeypatch.setattr(models, "free_memory", lambda device: 3 * parameters)
    assert "dtype=torch.bfloat16" in refusal(folder)
    load_model(str(folder), dtype=torch.bfloat16)


def test_hub_is_offline():
    """Offline, a model that was not downloaded is refused at once, and the ways out are named."""
    message = refusal("gpt2-xl")
    assert (
        "the Hugging Face hub cannot be reached" in message and "load_model('embedded')" in message
    )


@pytest.mark.parametrize(
    ("error", "saying"),
    [
        (ConnectionError("refused"), "the Hugging Face hub cannot be reached"),
        (hub_errors.RepositoryNotFoundError, "the hub has no model 'somebody/model'"),
        (hub_errors.GatedRepoError, "'somebody/model' is gated"),
    ],
)
def test_hub_refuses(monkeypatch, error, saying):
    """No answer, no such model, and no permission are told apart."""
    error = (
        error.__new__(error, "") if isinstance(error, type) else error
    )  # their own signature differs by version

    def model_info(self: object, name: str, timeout: float) -> None:
        raise error

    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models.HfApi, "model_info", model_info)
    assert saying in refusal("somebody/model")


def test_unreachable_hub_in_a_process(tmp_path):
    """A program that asks for a model where there is no network ends in one sentence."""
    source = (
        "from common.loading import *\ntry: load_model('gpt2-xl')\nexcept LoadError as error:"
        " print(error)"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1 and "cannot be reached" in result.stdout


# Copies.


def test_copy_shares_every_weight(model):
    """The copy's tensors are the model's own, tied ones tied; its modules are not."""
    own = copy_sharing_weights(model)
    theirs = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    mine = dict(own.named_parameters(remove_duplicate=False)) | dict(own.named_buffers())
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    assert own.lm_head.weight is own.transformer.wte.weight
    assert not {id(module) for module in own.modules()} & {id(module) for module in model.modules()}


def test_copy_keeps_its_hooks_and_parameters_to_itself(model, batch):
    """A hook or a replaced parameter of the copy does not reach the model."""
    own = copy_sharing_weights(model)
    calls = []
    get_block(own, 0).register_forward_hook(lambda *args: calls.append(1))
    get_block(own, 0).mlp.c_proj.bias = None
    model(**batch)
    assert not calls and get_block(model, 0).mlp.c_proj.bias is not None


# The embedded model as it ships.


def test_weights_are_the_pinned_ones():
    """The weights have the hash in the preset, are stored as fp16, and take at most 12 MB."""
    path = embedded.FOLDER / WEIGHTS
    pinned = json.loads((embedded.FOLDER / "preset.json").read_text())["sha256"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == pinned
    assert path.stat().st_size <= 12e6
    assert json.loads((embedded.FOLDER / CONFIG).read_text())["dtype"] == "float16"


def test_tokenizer_is_like_gpt2s(tokenizer):
    """One special token for beginning, end and padding, and none is added to a text by itself."""
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 1 and tokenizer.eos_token == "<|endoftext|>"
    assert not ids & set(tokenizer("Love")["input_ids"])


@pytest.mark.parametrize("word", ["Love", "Hate", "love", "hate"])
def test_contrast_words_are_whole_tokens(tokenizer, word):
    """The words of the contrast pair are one token each, with and without their space."""
    assert len(tokenizer(word)["input_ids"]) == len(tokenizer(f" {word}")["input_ids"]) == 1


@given(text=st.text(max_size=50))
def test_tokenizer_loses_nothing(tokenizer, text):
    """A byte-level tokenizer gives back any text as it was."""
    assert (
        tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    )


def test_a_guess_has_the_relative_depth_of_the_published_layer():
    """Layer 5 of 48; what is published says so itself."""
    assert [preset_for("other", blocks).layer for blocks in (48, 47, 12, 6)] == [5, 4, 1, 0]
    published = preset_for("gpt2-xl", 48)
    assert published.source == (
        f"published: layer {published.layer}, coefficient {published.coeff:g} on the unit direction"
    )
