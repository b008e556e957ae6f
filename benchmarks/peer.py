"""Runs in the environment of the peers: times steering-vectors whenever it is told to.

It reads one JSON object a line (shape, layers, batch size, pairs) and answers each with the seconds that training took and
where it left the vectors. `extraction` starts it and takes turns with it.
"""

import json
import sys
import time

import steering_vectors
import torch
import transformers
from safetensors.torch import save_file
from shapes import random_gpt2, random_pairs, word_tokenizer


def main() -> None:
    """Answer until there is no more to answer."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not look like an answer
    torch.set_num_threads(int(sys.argv[1]))
    tokenizer, name, model = word_tokenizer(), "", None
    versions = {"steering-vectors": steering_vectors.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        if case["shape"] != name:
            name, model = case["shape"], None  # the old one goes before the new one comes
            model = random_gpt2(name)
        pairs = random_pairs(case["pairs"], case["tokens"])
        started = time.perf_counter()
        vector = steering_vectors.train_steering_vector(
            model, tokenizer, pairs, layers=case["layers"], batch_size=case["batch_size"]
        )
        seconds = time.perf_counter() - started
        save_file({str(layer): found.contiguous() for layer, found in vector.layer_activations.items()}, case["vectors"])
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
