# vLLM has an environment of its own.
# pyright: reportMissingImports=false
"""The scheduler of vLLM, with the count law: a request that is not steered as asked fails."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from common.serving.counting import asked_counts, differences
from common.serving.requests import CHECKED, Steering, is_ours
from common.serving.slices import scheduled

logger = init_logger(__name__)


class SteeringScheduler(Scheduler):
    """Compares after every step what was steered with what the requests ask for.

    A request for which they differ ends with the finish reason "error" (over HTTP with status 500)
    and without a further token. Its keys and values leave the prefix cache.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steerings: dict[str, Steering] = {}
        self.unsteered: dict[str, str] = {}

    def add_request(self, request: Request) -> None:
        """Take a request, and note what it asks for."""
        extra_args = getattr(request.sampling_params, "extra_args", None) or {}
        if CHECKED in extra_args:
            self.steerings[request.request_id] = Steering.from_wire(extra_args[CHECKED])
        elif any(is_ours(key) for key in extra_args):
            self.unsteered[request.request_id] = "asks for steering, and was not checked"
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take the tokens of a step, after its counts."""
        slices = scheduled(scheduler_output)
        steerings = {id: self.steerings[id] for id in slices if id in self.steerings}
        done = getattr(model_runner_output, "steering", None)
        for request_id, what in differences(asked_counts(slices, steerings), done).items():
            if request_id in self.requests:
                self.unsteered[request_id] = what
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        what = self.unsteered.get(request.request_id)
        if what is None:
            return super()._update_request_with_output(request, new_token_ids, is_stale)
        logger.error("Request %s fails: %s.", request.request_id, what)
        request.status, request.stop_reason, request.resumable = (
            RequestStatus.FINISHED_ERROR,
            f"steering: {what}",
            False,
        )
        blocks = self.kv_cache_manager.get_block_ids(request.request_id)
        self.kv_cache_manager.evict_blocks({block for group in blocks for block in group})
        return [], True

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.steerings.pop(request.request_id, None)
        self.unsteered.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)
