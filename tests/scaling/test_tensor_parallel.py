"""A model that is split over two processes gives what it gives unsplit, or refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import tiny_config, tiny_model
from split_laws import REFUSED, SPLIT, laws
from transformers import AutoModelForCausalLM

from common import LoadError, load_model

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found(tokenizer, tmp_path_factory) -> list[dict[str, str]]:
    """What each of two processes says of each law."""
    folder = tmp_path_factory.mktemp("split")
    for name in (*SPLIT, *REFUSED):
        if name == "odd heads":
            config = tiny_config("Llama", len(tokenizer))
            config.num_key_value_heads = 1
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = tiny_model(name, len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    path = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "split_laws.py", folder]
    started = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    try:
        codes = [process.wait(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("law", laws())
def test_a_split_model_gives_what_it_gives_unsplit(found, law):
    for process in found:
        assert process[law] == "", process[law]


def test_one_process_alone_splits_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LoadError, match="this process is alone; start it .*torchrun"):
        load_model("embedded", tensor_parallel=True)


def test_a_split_model_has_no_device_of_its_own():
    with pytest.raises(ValueError, match="expected tensor_parallel or device, got both"):
        load_model("embedded", tensor_parallel=True, device="cpu")
