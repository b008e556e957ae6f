# vLLM has an environment of its own.
# pyright: reportMissingImports=false
"""The worker of vLLM: hooks after the layers, which add to the rows of each step what it needs.

Written for the first model runner of vLLM 0.30 (`vllm/v1/worker/gpu_model_runner.py`, from which
that of the CPU is derived): `_prepare_inputs` knows the rows of a step, `_model_forward` runs the
layers, `sample_tokens` returns what goes to the scheduler. Runs in which nobody asked for anything,
as those that measure memory, call the model itself and stay unsteered.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from common.places.blocks import get_block
from common.serving.counting import Ledger, done_counts
from common.serving.deltas import Deltas, add_to_output
from common.serving.offers import ScaledRows
from common.serving.requests import CHECKED, Steering
from common.serving.slices import Run, slices_of_rows, steered_runs
from common.serving.vllm_plugin import offers_of


class SteeringExtension:
    """What vLLM makes a base of its worker class (`worker_extension_cls`).

    How it does is in `init_worker` of
    https://docs.vllm.ai/en/v0.30.0/api/vllm/v1/worker/worker_base/.

    Its methods can be called from outside: `llm.collective_rpc("steering_report")`.
    """

    vllm_config: Any
    model_runner: Any

    def install_steering(self) -> None:
        """Let the model runner steer as soon as it has a model."""
        runner, load_model = self.model_runner, self.model_runner.load_model

        def load_and_hook(*args: Any, **kwargs: Any) -> None:
            load_model(*args, **kwargs)
            runner.steering = RunnerSteering(runner, self.vllm_config)

        runner.load_model = load_and_hook

    def steering_report(self) -> dict[str, int]:
        """Return by request how many tokens x layers were steered; see `Ledger`."""
        return dict(self.model_runner.steering.ledger.counts)


class RunnerSteering:
    """Steers the steps of a model runner. THE RUNNER IS CHANGED: three methods and its layers.

    Args:
        runner: a `GPUModelRunner` that has loaded its model.
        vllm_config: of the engine.

    Raises:
        ValueError: see `offers_of`.
    """

    def __init__(self, runner: Any, vllm_config: Any):
        self.runner, self.ledger = runner, Ledger()
        _, served = offers_of(vllm_config)
        rows = ScaledRows(served, vllm_config.model_config.dtype, runner.device)
        self.deltas = Deltas(rows)
        self.runs: list[Run] = []
        self.rows = 0
        self.now: dict[int, Tensor] = {}
        self.passes: dict[int, int] = {}
        self.done: dict[str, int] | None = None
        for layer in sorted({layer for one in served.values() for layer in one.rows}):
            get_block(runner.get_model(), layer).register_forward_hook(self._hook(layer))
        self.prepare_inputs, runner._prepare_inputs = runner._prepare_inputs, self._prepare
        self.model_forward, runner._model_forward = runner._model_forward, self._forward
        self.sample_tokens, runner.sample_tokens = runner.sample_tokens, self._sample

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple, Any], Any]:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
            delta = self.now.get(layer)
            if delta is None:
                return None
            self.passes[layer] = self.passes.get(layer, 0) + 1
            return add_to_output(output, delta)

        return hook

    def _prepare(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """Find the rows of this step that are steered."""
        prepared = self.prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.runner.input_batch
        requests = batch.req_ids[: batch.num_reqs]
        steerings = {
            request: steering
            for request in requests
            if (steering := self._steering(request)) is not None
        }
        if steerings:
            positions = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
            slices = slices_of_rows(requests, num_scheduled_tokens.tolist(), positions)
            self.runs = steered_runs(slices, steerings)
            self.rows = scheduler_output.total_num_scheduled_tokens
        else:
            self.runs = []
        return prepared

    def _steering(self, request: str) -> Steering | None:
        """Return what a request asks for; it is kept with its state, and ends with it."""
        state = self.runner.requests[request]
        if not hasattr(state, "steering"):
            wire = (getattr(state.sampling_params, "extra_args", None) or {}).get(CHECKED)
            state.steering = None if wire is None else Steering.from_wire(wire)
        return state.steering

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers, steered, and count."""
        if self.runs:
            self.now = self.deltas.of_step(self.runs, self.rows)
        self.passes = {}
        try:
            return self.model_forward(*args, **kwargs)
        finally:
            self.done = done_counts(self.runs, self.passes)
            self.ledger.add(self.done)
            self.runs, self.now = [], {}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the counts of the step to the scheduler, with its tokens."""
        output = self.sample_tokens(*args, **kwargs)
        if self.done is not None:
            output.steering, self.done = self.done, None
        return output
