# vLLM has an environment of its own.
# pyright: reportMissingImports=false
"""vLLM in the workers of an engine: completions of a sweep, each steered as its row asks.

The environment is that of `make engines`, with Ray beside it.
"""

import gc
import os
import random
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.identity import hash_of_tensors
from common.scaling.units import Completion, CompletionJob, Job, Unit, Work
from common.serving.requests import steering_args
from common.serving.vllm_plugin import register, vllm_package
from common.vectors.steering_vector import SteeringVector

# In this process, so that nothing is left behind when it is killed; see also `vllm_plugin`.
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmRunner:
    """Computes the completions of `sweep` by vLLM instead of transformers, in a `RayEngine`.

        RayEngine(workers=8, gpus_per_worker=1, load=load, runner=VllmRunner(max_num_seqs=512))

    A worker still loads the model by `load`, to prove that it is the same; then its weights make
    room for vLLM's, which come from the folder or the hub id that they were loaded from. Greedy
    texts are those of transformers, but for close calls that another order of adding turns over;
    sampled ones come from other random numbers. The table has a column `runner`, and a file that
    transformers began is not gone on with.

    What is steered has to be a vector after a block, at all tokens; no penalties are sampled with.

    Args:
        options: of `vllm.LLM`, such as `gpu_memory_utilization` or `max_num_seqs`.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """

    def __init__(self, **options: Any):
        try:
            self.options, self.name = options, f"vllm {version(vllm_package())}"
        except PackageNotFoundError:
            raise ModuleNotFoundError(
                "vLLM is not installed here: `make engines` sets up an environment for it"
            ) from None

    def check(self, job: Job) -> None:
        """Refuse a job that vLLM cannot do, before any worker starts.

        Raises:
            ValueError: with what it can do.
        """
        if not isinstance(job, CompletionJob):
            raise ValueError(
                "vLLM computes completions: expected sweep, and another engine for all else"
            )
        job.vectors()
        sampling = job.sampling_options()
        if sampling["freq_penalty"] or sampling["repetition_penalty"] != 1:
            raise ValueError(
                "vLLM counts other tokens for its penalties than transformers does: expected a"
                " sampling without"
            )

    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "_StartedRunner":
        """Return what computes units in this process, which has the model to itself."""
        return _StartedRunner(self, model, tokenizer)


class _StartedRunner:
    def __init__(
        self, runner: VllmRunner, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ):
        self.runner, self.tokenizer = runner, tokenizer
        self.source, self.dtype = model.name_or_path, str(model.dtype).removeprefix("torch.")
        self.ends = model.generation_config.eos_token_id
        self.loaded: str | None = None
        self.llm: Any = None

    def on(self, job: CompletionJob) -> Work[Any]:
        """Return what computes a unit of a job."""
        self._load(job.vectors())
        sampling = job.sampling_options()

        def work(unit: Unit) -> Any:
            asked = job.asked(unit)
            outputs = self.llm.generate(
                [{"prompt_token_ids": one.prompt} for one in asked],
                [self._parameters(one, sampling) for one in asked],
                use_tqdm=False,
            )
            ids = [list(output.outputs[0].token_ids) for output in outputs]
            texts = self.tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return job.rows(unit, texts)

        return work

    def _parameters(self, one: Completion, sampling: Mapping[str, Any]) -> Any:
        from vllm import SamplingParams

        extra = None
        if one.steering is not None:
            name, coeff, layers = one.steering
            extra = steering_args(name, coeff, layers)
        return SamplingParams(
            max_tokens=sampling["max_new_tokens"],
            temperature=sampling["temperature"],
            top_p=sampling["top_p"] if sampling["temperature"] else 1.0,
            # The same random numbers for one sample of a prompt, however it is steered.
            seed=random.Random(str(one.seed)).getrandbits(31) if sampling["temperature"] else None,
            stop_token_ids=self._ends(),
            detokenize=False,
            extra_args=extra,
        )

    def _ends(self) -> list[int]:
        ends = self.ends
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _load(self, vectors: Mapping[str, tuple[Mapping[int, Any], float]]) -> None:
        """Start vLLM with the vectors of a job, unless it has them already."""
        tensors = [vector for layers, _ in vectors.values() for vector in layers.values()]
        key = repr([(name, list(layers), most) for name, (layers, most) in vectors.items()])
        key += hash_of_tensors(tensors)
        if self.loaded == key:
            return
        self.close()
        os.environ.update(ENVIRONMENT)
        register()
        from vllm import LLM

        steering: dict[str, Any] = {"max_coeff": 1.0, "vectors": {}}
        with tempfile.TemporaryDirectory() as folder:
            for number, (name, (layers, most)) in enumerate(vectors.items()):
                path = Path(folder, f"{number}.safetensors")
                SteeringVector(dict(layers)).save(path)
                steering["vectors"][name] = str(path)
                steering["max_coeff"] = max(steering["max_coeff"], most)
            self.llm = LLM(
                self.source,
                **{
                    "dtype": self.dtype,
                    "enforce_eager": True,
                    "async_scheduling": False,
                    "skip_tokenizer_init": True,
                    "generation_config": "vllm",  # nothing of the model's own
                    **self.runner.options,
                    **({"additional_config": {"steering": steering}} if vectors else {}),
                },
            )
        self.loaded = key

    def close(self) -> None:
        """Let go of vLLM and its memory."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
