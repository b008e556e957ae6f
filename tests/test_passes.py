"""What a pass over a batch needs, where several threads or several parts of a batch meet."""

import threading

from architectures import tiny_model

from common.passes import in_evaluation_mode


def test_evaluation_mode_lasts_as_long_as_any_thread_needs_it():
    model = tiny_model("GPT-2", 50).train()
    model.lm_head.eval()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with in_evaluation_mode(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with in_evaluation_mode(model):
        leave.set()
        thread.join()
        assert not any(module.training for module in model.modules())
    assert {name for name, module in model.named_modules() if not module.training} == {"lm_head"}
