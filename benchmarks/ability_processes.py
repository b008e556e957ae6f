"""What the trials run elsewhere: `load FOLDER` in a fresh process, `parallel FOLDER` in two."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    """Steer a model that is split between processes by each mechanism; rank 0 writes the logits."""
    import torch.distributed as dist

    from repository.mechanisms import load_mechanism

    given = json.loads((folder / "given.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(given["prompts"], return_tensors="pt", padding=True)
    vector, answers = torch.tensor(given["vector"]), {}
    for name in given["mechanisms"]:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, tp_plan="auto"
        ).eval()
        mechanism = load_mechanism(name)
        try:
            wrapped = mechanism.wrap(model, tokenizer)
            with mechanism.steer(wrapped, given["layer"], vector):
                scores = mechanism.logits(wrapped, inputs)
            answers[name] = scores[inputs["attention_mask"].bool()].tolist()
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        (folder / "answers.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    {"load": load, "parallel": parallel}[sys.argv[1]](Path(sys.argv[2]))
