"""What a pass over a batch needs, where several threads or several parts of a batch meet."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from architectures import tiny_model

from common.hooking import uncompiled
from common.passes import in_evaluation_mode


def left_by_another_thread(block: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Open a block in another thread; what is returned ends it there."""
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with block():
            inside.set()
            leave.wait(10)

    def end() -> None:
        leave.set()
        thread.join()

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    return end


def test_evaluation_mode_lasts_as_long_as_any_thread_needs_it():
    model = tiny_model("GPT-2", 50).train()
    model.lm_head.eval()
    end = left_by_another_thread(lambda: in_evaluation_mode(model))
    with in_evaluation_mode(model):
        end()
        assert not any(module.training for module in model.modules())
    assert {name for name, module in model.named_modules() if not module.training} == {"lm_head"}


def test_compiled_code_is_left_out_as_long_as_any_thread_needs_it():
    ran = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        def run(*args: torch.Tensor) -> tuple:
            ran.append("compiled")
            return graph(*args)

        return run

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    end = left_by_another_thread(uncompiled)
    with uncompiled():
        end()
        compiled(torch.ones(2))
        assert not ran
    compiled(torch.ones(2))
    assert ran == ["compiled"]
