"""vLLM in the workers of an engine gives the completions that transformers gives.

What needs vLLM and Ray runs in the environment of `make engines`; what the runner is asked for, and
what it makes of the answers, is tested without.
"""

import importlib.util
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pandas as pd
import pytest
import torch
from vllm_bench import NEEDS_VLLM

from common import (
    ActivationAddition,
    Grid,
    Sampling,
    SteeringVector,
    ablation_then_addition_operator,
    complete,
    read_sweep,
    sweep,
    sweep_logits,
)
from common.loading import load_model
from common.scaling.ray_engine import RayEngine
from common.scaling.units import Unit
from common.serving import vllm_runner
from common.serving.vllm_runner import VllmRunner
from common.sweeping.runs import Completing
from common.sweeping.texts import Texts

NEEDS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not in this environment"
)
PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the", "This year winter is"]
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


def vectors() -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: SteeringVector(dict(enumerate(scale * torch.randn(6, 256, generator=generator))))
        for name, scale in (("one", 0.5), ("another", 0.8))
    }


GRID = Grid(vectors(), [1, 4], [-2.0, 2.0], random_controls=1)


@pytest.fixture
def job(model, tokenizer) -> Completing:
    texts = Texts(model, tokenizer, PROMPTS, None)
    return Completing(texts, GRID.cells(model, tokenizer), GREEDY, 1, 0, 2**30, "played 1")


@pytest.fixture
def runner(monkeypatch) -> VllmRunner:
    """As where vLLM is installed."""
    monkeypatch.setattr(vllm_runner, "vllm_package", lambda: "torch")
    return VllmRunner()


def test_each_text_that_is_asked_for_is_the_row(model, tokenizer, job):
    """Completed alone, steered by the vector, coefficient and layer that are asked for."""
    offered = job.vectors()
    assert offered["one"][1] == 2 and set(offered) == {
        *("one", "another", "one, random 1", "another, random 1")
    }
    (unit,) = job.units(())
    texts = []
    for one in job.asked(unit):
        prompt = tokenizer.decode(one.prompt)
        assert tokenizer(prompt)["input_ids"] == one.prompt
        steering = None
        if one.steering is not None:
            name, coeff, layers = one.steering
            vector = SteeringVector({layer: offered[name][0][layer] for layer in layers})
            steering = vector.apply(model, multiplier=coeff)
        options = {"sampling": GREEDY, "prepend_bos": None}
        texts += complete(model, tokenizer, [prompt], steering, **options)["completions"].tolist()
    assert len(set(texts)) > 20
    expected = replace(job, runner=None).compute(unit)
    assert job.rows(unit, texts) == {
        number: {**row, "runner": "played 1"} for number, row in expected.items()
    }


def test_seeds_belong_to_prompt_and_sample(job):
    """And not to the steering, so that a sample is comparable with the unsteered one."""
    job = replace(job, per_prompt=2, seed=3)
    asked = job.asked(Unit(tuple(range(len(job)))))
    assert len({one.seed for one in asked}) == 2 * len(PROMPTS)
    assert asked[0].seed == asked[2 * len(PROMPTS)].seed == (3, 0, 0)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"sampling": replace(GREEDY, freq_penalty=1.0)}, "expected a sampling without"),
        ({"sampling": replace(GREEDY, repetition_penalty=1.1)}, "expected a sampling without"),
    ],
)
def test_what_it_would_do_otherwise_is_refused(job, runner, change, says):
    with pytest.raises(ValueError, match=says):
        runner.check(replace(job, **change))


@pytest.mark.parametrize(
    "grid",
    [
        Grid({"a": [ActivationAddition(5.0, 2, prompt="Love")]}, coeffs=[1.0]),
        Grid({"a": vectors()["one"]}, [1], operator=ablation_then_addition_operator()),
        Grid({"a": vectors()["one"]}, [1], min_token_index=1),
        Grid({"a": SteeringVector({1: torch.ones(256)}, "mlp")}, [1]),
    ],
    ids=["additions", "operator", "some tokens", "mlp"],
)
def test_other_steering_is_refused(model, tokenizer, job, runner, grid):
    with pytest.raises(ValueError, match="added after a block, at all tokens: 'a' is something el"):
        runner.check(replace(job, cells=grid.cells(model, tokenizer)))


def test_layers_together(model, tokenizer, job):
    """All layers of the vector are asked for at once."""
    grid = Grid({"a": vectors()["one"]}, [1, 4], together=True)
    job = replace(job, cells=grid.cells(model, tokenizer))
    assert {str(one.steering) for one in job.asked(job.units(())[0])} == {
        *("None", "('a', 1.0, [1, 4])")
    }


class Elsewhere:
    """An engine that never comes to work."""

    parts = None

    def __init__(self, runner):
        self.runner = runner

    def run(self, *work):
        raise AssertionError("it began")


def test_only_completions_and_before_any_worker_starts(model, tokenizer, runner, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="vLLM computes completions: expected sweep"):
        sweep_logits(model, tokenizer, GRID, PROMPTS, engine=RayEngine(runner=runner))
    path = tmp_path / "a.sweep"
    penalised = {"sampling": Sampling(max_new_tokens=2, freq_penalty=1.0), "path": path}
    with pytest.raises(ValueError, match="expected a sampling without"):
        sweep(model, tokenizer, GRID, PROMPTS, engine=Elsewhere(runner), **penalised)
    assert not path.exists()


def test_engines_refuse_what_is_no_runner(runner):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="expected None or VllmRunner"):
        RayEngine(runner="vllm")
    with pytest.raises(ValueError, match="expected tensor_parallel=1 beside it, got 2"):
        RayEngine(runner=runner, tensor_parallel=2)


def test_without_vllm_it_says_so(monkeypatch):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(ModuleNotFoundError, match="make engines"):
        VllmRunner()


class TestOnTheEngine:
    """On Ray, with vLLM."""

    pytestmark: ClassVar = [*NEEDS_VLLM, NEEDS_RAY]

    @pytest.fixture(scope="class")
    def engine(self):
        """Its workers inherit what a small machine needs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
            patch.setenv("TORCH_COMPILE_DISABLE", "1")
            runner = VllmRunner(gpu_memory_utilization=0.2, max_num_seqs=32)
            load = partial(load_model, "embedded", device="cpu")
            with RayEngine(workers=1, load=load, runner=runner) as engine:
                yield engine

    @pytest.fixture(scope="class", autouse=True)
    def one_thread(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    def test_greedy_texts_are_those_of_transformers(self, model, tokenizer, engine, tmp_path):
        """And the rows say who wrote them; a file that the other began is refused."""
        path, other = tmp_path / "a.sweep", tmp_path / "b.sweep"
        options = {"sampling": GREEDY, "max_memory": 20_000_000}
        found = sweep(model, tokenizer, GRID, PROMPTS, path=path, engine=engine, **options)
        assert set(found["runner"]) == {"vllm 0.30.0"}
        expected = sweep(model, tokenizer, GRID, PROMPTS, path=other, **options)
        pd.testing.assert_frame_equal(found.drop(columns="runner"), expected)
        pd.testing.assert_frame_equal(read_sweep(path), found)
        assert expected["completion"].nunique() > 20
        with pytest.raises(ValueError, match="other settings"):
            sweep(model, tokenizer, GRID, PROMPTS, path=other, engine=engine, **options)

    def test_samples_are_the_same_again_and_at_coefficient_0(self, model, tokenizer, engine):
        """Other vectors are loaded on the way, in the same worker."""
        grid = Grid({"new": vectors()["another"]}, [2], [0.0, 3.0])
        sampling = Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9)
        options = {"sampling": sampling, "per_prompt": 3, "engine": engine}
        found, again = (sweep(model, tokenizer, grid, PROMPTS, **options) for _ in range(2))
        pd.testing.assert_frame_equal(found, again)
        by = {
            coeff: rows["completion"].tolist() for coeff, rows in found.groupby(["kind", "coeff"])
        }
        assert by["unsteered", 0.0] == by["steering", 0.0] != by["steering", 3.0]
        assert len(set(by["unsteered", 0.0])) > 8
