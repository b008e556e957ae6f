"""What the trials run elsewhere: `load FOLDER` in a fresh process, `parallel FOLDER` in two."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repository.mechanisms import load_mechanism


def load(folder: Path) -> None:
    """Load every model in a folder with transformers alone; print the logits of stdin's inputs."""
    inputs = {key: torch.tensor(value) for key, value in json.load(sys.stdin).items()}
    answers = {}
    for path in sorted(folder.iterdir()):
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            with torch.no_grad():
                answers[path.name] = model(**inputs).logits.tolist()
        except Exception as error:
            answers[path.name] = f"{type(error).__name__}: {error}"
    print(json.dumps(answers))


def parallel(folder: Path) -> None:
    """Steer a model that is split between two processes, each with half of every layer.

    Where that is safe the two are forked after the imports, so that these are paid for once.
    """
    for name in json.loads((folder / "given.json").read_text())["names"]:
        load_mechanism(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [context.Process(target=steer_part, args=(folder, rank, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


def steer_part(folder: Path, rank: int, port: int) -> None:
    """Run one of the two processes; the first one writes the logits of every mechanism."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    given = json.loads((folder / "given.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(given["prompts"], return_tensors="pt", padding=True)
    vector, answers = torch.tensor(given["vector"]), {}
    for name in given["names"]:
        mechanism = load_mechanism(name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, tp_plan="auto"
        ).eval()
        try:
            wrapped = mechanism.wrap(model, tokenizer)
            with mechanism.steer(wrapped, given["layer"], vector):
                scores = mechanism.logits(wrapped, inputs)
            answers[name] = scores[inputs["attention_mask"].bool()].tolist()
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    if rank == 0:
        (folder / "answers.json").write_text(json.dumps(answers))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"load": load, "parallel": parallel}[sys.argv[1]](Path(sys.argv[2]))
