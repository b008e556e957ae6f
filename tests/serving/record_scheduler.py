"""Records what a scheduler of vLLM hands out and its worker does, for `test_serving_counts`.

    python tests/serving/record_scheduler.py

in the environment of `make engines`, from the root of the project.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WHERE = Path(__file__).with_name("scheduler_states.json")


def describe(output: Any, batch: Any, done: Any) -> dict[str, Any]:
    """A step, in plain values."""
    old = output.scheduled_cached_reqs
    rows = batch.req_ids[: batch.num_reqs]
    return {
        "num_scheduled_tokens": dict(output.num_scheduled_tokens),
        "new": {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs},
        "cached": dict(zip(old.req_ids, old.num_computed_tokens)),
        "resumed": sorted(old.resumed_req_ids),
        "finished": sorted(output.finished_req_ids),
        "rows": list(rows),
        "lengths": [output.num_scheduled_tokens[request] for request in rows],
        "positions": batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(),
        "done": dict(done),
    }


def main() -> None:
    """Run 14 requests in an engine with little room, in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serving")]
    from vllm_bench import Bench, engine, mixed, sampling

    from common.loading import load_model
    from common.serving.requests import CHECKED
    from common.serving.vllm_worker import RunnerSteering

    steps: list[dict[str, Any]] = []
    steerings: dict[str, Any] = {}
    prepare, forward = RunnerSteering._prepare, RunnerSteering._forward
    now: dict[str, Any] = {}

    def noting_prepare(self: Any, output: Any, lengths: Any) -> Any:
        now["output"] = output
        return prepare(self, output, lengths)

    def noting_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        steps.append(describe(now["output"], self.runner.input_batch, self.done))
        for name, request in self.runner.requests.items():
            steerings[name] = (request.sampling_params.extra_args or {}).get(CHECKED)
        return result

    RunnerSteering._prepare, RunnerSteering._forward = noting_prepare, noting_forward
    model, tokenizer, _ = load_model("embedded", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, Path(folder), tokenizer)
        asks = mixed(model.config.vocab_size, model.config.num_hidden_layers - 1, 14, length=24)
        options = {"block_size": 32, "num_gpu_blocks_override": 10, "max_num_batched_tokens": 40}
        with engine(bench, **options) as llm:
            for number, ask in enumerate(asks):
                prompt = {"prompt_token_ids": list(ask.prompt)}
                llm.llm_engine.add_request(f"{number}", prompt, sampling(ask))
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                if len(steps) == 9:
                    llm.llm_engine.abort_request(["3", "10"])
    lines = ",\n".join(json.dumps(step) for step in steps)
    WHERE.write_text(f'{{"steerings": {json.dumps(steerings)},\n"steps": [\n{lines}\n]}}\n')
    print(f"{len(steps)} steps in {WHERE.name}")


if __name__ == "__main__":
    main()
