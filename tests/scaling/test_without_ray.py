"""Ray is not among the requirements: without it everything but the engine is there."""

import sys

import pytest

from common import RayEngine


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    with pytest.raises(ModuleNotFoundError, match=r"pip install -r requirements-scale\.txt"):
        RayEngine()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"cpus_per_worker": 0}, "cpus_per_worker"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"load": "gpt2-xl"}, "as load"),
        ({"runner": "vllm"}, r"expected None or VllmRunner\(\) as runner, got 'vllm'"),
    ],
)
def test_engines_that_mean_nothing(monkeypatch, options, says):
    """Whether Ray is there or not, and before anything starts."""
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(ValueError, match=says):
        RayEngine(**options)
