"""The laws of steering in vLLM, on the real engine, against transformers.

They need the environment of `make engines`.
"""

import copy
import importlib
import importlib.util
import random

import pytest
import vllm_bench
from vllm_bench import (
    NEEDS_VLLM,
    TINY,
    Ask,
    Bench,
    answer_of,
    assert_equal,
    engine,
    mixed,
    report,
    run,
)

from common.loading import copy_sharing_weights
from common.serving import vllm_plugin
from common.serving.requests import steering_args
from repository.mechanisms import load_mechanism

pytestmark = NEEDS_VLLM

if importlib.util.find_spec("vllm") is not None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError


@pytest.fixture(scope="module", autouse=True)
def environment():
    """How an engine starts on a small machine; its processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        # vLLM compiles how it ranks probabilities, also in eager mode: slow, and for a few tokens.
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def embedded(model, tokenizer, tmp_path_factory):
    return Bench(copy_sharing_weights(model), tmp_path_factory.mktemp("embedded"), tokenizer)


# Blocks of 32 tokens, and 20 of them: 32 requests interrupt each other. Chunks of 48 tokens.
TIGHT = {
    "block_size": 32,
    "num_gpu_blocks_override": 20,
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "disable_log_stats": False,
}


@pytest.fixture(scope="module")
def llm(embedded):
    """The embedded model, in an engine with little room."""
    with engine(embedded, **TIGHT) as llm:
        yield llm


def batch(bench: Bench, **more) -> list:
    config = bench.model.config
    return mixed(config.vocab_size, config.num_hidden_layers - 1, **more)


def metric(llm, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def assert_counted(llm, bench: Bench, asks, outputs) -> None:
    """Each request was steered as often as it asked for, counted token by token.

    Requests that were interrupted or found their prompt in the cache are left to the scheduler.
    """
    counts = report(llm)
    for ask, output in zip(asks, outputs):
        steered = {i: n for i, n in counts.items() if i.startswith(f"{output.request_id}-")}
        assert sum(steered.values()) == bench.asked(ask), (ask, steered)


def test_embedded_model_as_in_transformers(embedded, llm):
    """Mixed requests in one batch, in chunks, some interrupted and computed again."""
    asks = batch(embedded, length=40)
    before = metric(llm, "vllm:num_preemptions")
    for ask, output in zip(asks, run(llm, asks)):
        assert_equal(answer_of(output), embedded.answer(ask), ask)
    assert metric(llm, "vllm:num_preemptions") > before


def test_a_batch_gives_what_each_request_gives_alone(embedded, llm):
    asks = batch(embedded)
    together = run(llm, asks)
    for ask, output in zip(asks, together):
        (alone,) = run(llm, [ask])
        assert_equal(answer_of(alone), answer_of(output), ask)
        assert_equal(answer_of(alone), embedded.answer(ask), ask)


@pytest.mark.parametrize("name", TINY)
def test_fused_residuals_as_in_transformers(name, tmp_path):
    """Layers of these return (hidden, residual). 32 mixed requests at once, and their counts."""
    bench = Bench(vllm_bench.tiny_model(name), tmp_path)
    asks = batch(bench)
    assert any(bench.answer(a) != bench.answer(Ask(a.prompt)) for a in asks if a.name)
    with engine(bench, enable_prefix_caching=False) as llm:
        outputs = run(llm, asks)
        for ask, output in zip(asks, outputs):
            assert_equal(answer_of(output), bench.answer(ask), ask)
        assert_counted(llm, bench, asks, outputs)


def test_every_request_is_steered_as_often_as_it_asked(embedded, llm):
    asks = [
        ask._replace(prompt=vllm_bench.prompt(100 + n, 9, 3000))
        for n, ask in enumerate(batch(embedded, count=10))
    ]
    assert_counted(llm, embedded, asks, run(llm, asks))


def test_the_prefix_cache_keeps_steerings_apart(embedded, llm):
    """Steered, unsteered and steered otherwise on one prompt; each finds only its own."""
    prompt = vllm_bench.prompt(7, 70, 3000)
    asks = [Ask(prompt, "one", 6.0), Ask(prompt), Ask(prompt, "one", -6.0)]
    asks += [Ask(prompt, "one", 6.0, min_token_index=60), Ask(prompt, "all", 1.0, (1,))]
    assert len({tuple(embedded.answer(ask).tokens) for ask in asks}) >= 3
    for round_ in (0, 1):
        for ask in asks:
            (output,) = run(llm, [ask])
            assert_equal(answer_of(output), embedded.answer(ask), ask)
            assert output.num_cached_tokens == 64 * round_, ask


def test_several_texts_of_one_request_are_all_steered(embedded, llm):
    ask = Ask(vllm_bench.prompt(8, 9, 3000), "one", 4.0)
    # Greedy sampling has one text; of the most probable token alone every draw takes that.
    options = {"top_k": 1, "max_tokens": ask.length, "ignore_eos": True, "detokenize": False}
    params = SamplingParams(n=3, extra_args=ask.args(), **options)
    (output,) = llm.generate([{"prompt_token_ids": list(ask.prompt)}], params, use_tqdm=False)
    assert [list(one.token_ids) for one in output.outputs] == [embedded.answer(ask).tokens] * 3


def test_sampling_parameters_can_be_used_again(llm):
    params = SamplingParams(max_tokens=2, detokenize=False, extra_args=steering_args("one", 2))
    prompts = [{"prompt_token_ids": [5, 6, 7]}] * 2
    for _ in range(2):
        assert len(llm.generate(prompts, params, use_tqdm=False)) == 2
    assert params.extra_args == steering_args("one", 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"steering": "none"}, "unknown steering vector 'none'"),
        (steering_args("one", float("nan")), "finite number"),
        (steering_args("one", 8.5), "between -8 and 8"),
        (steering_args("one", layers=[2]), "no vector for layer 2"),
        ({"steering": "one", "steering_scale": 1}, "unknown argument 'steering_scale'"),
        (steering_args("front"), "the prompt has 2 tokens"),
    ],
)
def test_what_is_wrong_is_refused_before_it_is_scheduled(embedded, llm, args, message):
    scheduled = metric(llm, "vllm:prompt_tokens")
    prompts = [{"prompt_token_ids": [5, 6]}]
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate(prompts, SamplingParams(max_tokens=2, extra_args=args), use_tqdm=False)
    assert metric(llm, "vllm:prompt_tokens") == scheduled
    ask = Ask(vllm_bench.prompt(3, 5, 3000), "one", 3.0)
    assert_equal(answer_of(*run(llm, [ask])), embedded.answer(ask), ask)


def add(llm, name: str, ask) -> None:
    llm.llm_engine.add_request(
        name, {"prompt_token_ids": list(ask.prompt)}, vllm_bench.sampling(ask)
    )


def test_requests_that_are_aborted_leave_the_others_alone(embedded, llm):
    asks = batch(embedded, length=16)
    for number, ask in enumerate(asks):
        add(llm, str(number), ask)
    finished = {}
    for step in range(1000):
        for output in llm.llm_engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
        if step == 6:
            llm.llm_engine.abort_request([str(number) for number in range(0, 32, 3)])
        if not llm.llm_engine.has_unfinished_requests():
            break
    kept = [number for number in range(32) if number % 3]
    assert set(kept) <= set(finished)
    for number in kept:
        assert_equal(answer_of(finished[number]), embedded.answer(asks[number]), asks[number])


def test_a_thousand_requests_that_come_when_they_like(embedded, llm):
    """1,000 requests of 60 kinds, some between any two steps; one in ten is aborted."""
    chance = random.Random(0)
    kinds = [ask._replace(length=1 + n % 7) for n, ask in enumerate(batch(embedded, count=60))]
    asks = [chance.choice(kinds) for _ in range(1000)]
    aborted = {number for number in range(1000) if chance.random() < 0.1}
    waiting, finished = list(range(1000)), {}
    while waiting or llm.llm_engine.has_unfinished_requests():
        for _ in range(chance.choice([0, 0, 1, 3, 12])):
            if waiting:
                add(llm, f"{waiting[0]}", asks[waiting.pop(0)])
        for output in llm.llm_engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
        begun = aborted - set(waiting) - set(finished)
        llm.llm_engine.abort_request([f"{number}" for number in begun if chance.random() < 0.3])
    kept = set(range(1000)) - aborted
    assert kept <= set(finished)
    for number in kept:
        assert_equal(answer_of(finished[number]), embedded.answer(asks[number]), asks[number])


def test_a_checkpoint_with_an_edited_bias_needs_no_plugin(embedded, model, tokenizer, tmp_path):
    """An engine that is started without vectors writes what the steered model does. GPT-2 only."""
    editing = load_mechanism("bias_editing")
    wrapped = editing.wrap(copy.deepcopy(model), tokenizer)
    vector = 3.0 * embedded.vectors["one"].layer_activations[1]
    with editing.steer(wrapped, 1, vector):
        edited = Bench(wrapped, tmp_path, tokenizer)
    prompts = [vllm_bench.prompt(n, 5 + n, 3000) for n in range(6)]
    with engine(edited, additional_config={}) as plain:
        for prompt, output in zip(prompts, run(plain, [Ask(prompt) for prompt in prompts])):
            ask = Ask(prompt, "one", 3.0)
            assert_equal(answer_of(output), embedded.answer(ask), ask)


# --- an engine that cannot steer as asked ---


def start(bench: Bench, **options):
    """Configure an engine, as far as it can be refused."""
    return EngineArgs(
        str(bench.folder / "model"),
        **{"enforce_eager": True, "additional_config": {"steering": bench.steering}, **options},
    ).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enforce_eager": False}, "steering needs eager mode"),
        ({"worker_extension_cls": "a.B"}, "brings its own worker_extension_cls"),
        ({"scheduler_cls": "a.B"}, "brings its own scheduler_cls"),
        ({"tensor_parallel_size": 2}, "with one worker, not with {'tensor_parallel_size': 2}"),
        ({"additional_config": {"steering": {"vectors": {}}}}, "at least one file"),
    ],
)
def test_an_engine_that_cannot_steer_does_not_start(embedded, options, message):
    assert start(embedded).scheduler_config.scheduler_cls
    with pytest.raises(ValueError, match=message):
        start(embedded, **options)


@pytest.mark.parametrize("version", [(0, 29), (0, 31), (1, 30)])
def test_other_versions_are_refused(embedded, monkeypatch, version):
    monkeypatch.setattr("vllm.__version_tuple__", (*version, 0))
    with pytest.raises(ValueError, match=r"made for vLLM 0\.30 \(before 0\.31\)"):
        start(embedded)


def test_an_engine_without_vectors_refuses_requests_that_ask(embedded):
    config = start(embedded, additional_config={})
    assert config.scheduler_config.scheduler_cls is None
    from vllm.v1.engine.input_processor import InputProcessor

    processor = InputProcessor(config)
    prompt = {"type": "token", "prompt_token_ids": [5, 6]}
    params = SamplingParams(extra_args=steering_args("one"))
    with pytest.raises(VLLMValidationError, match="started without steering vectors"):
        processor.process_inputs("0", prompt, params, ("generate",))


def test_the_kinds_of_requests_that_are_watched_are_those_of_the_server():
    """In another version they may have other names, and would be watched no more."""
    for place, name in vllm_plugin._PROTOCOLS.items():
        kind = getattr(importlib.import_module(place), name)
        assert callable(kind.to_sampling_params) and "vllm_xargs" in kind.model_fields
        assert kind.model_config["extra"] == "allow", "fields beside it would be dropped"


# --- a count that is wrong ---


def test_a_layer_that_does_not_steer_fails_its_requests_and_no_others(embedded, monkeypatch):
    """In one process, so that a hook can be taken away, and given back."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompts = [vllm_bench.prompt(n, 40, 3000) for n in range(6)]
    asks = [Ask(prompts[n], "all" if n % 2 else None, 1.0, (1, 3)) for n in range(6)]
    with engine(embedded, block_size=32) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        (block,) = [
            module
            for name, module in worker.model_runner.get_model().named_modules()
            if name == "transformer.h.3"
        ]
        hooks = block._forward_hooks.copy()
        block._forward_hooks.clear()
        for ask, output in zip(asks, run(llm, asks)):
            (one,) = output.outputs
            if ask.name is None:
                assert_equal(answer_of(output), embedded.answer(ask), ask)
            else:
                assert one.finish_reason == "error" and not one.token_ids
                assert "steered 40 tokens x layers" in one.stop_reason
                assert "80 were asked for" in one.stop_reason
        block._forward_hooks.update(hooks)
        for ask, output in zip(asks, run(llm, asks)):
            assert_equal(answer_of(output), embedded.answer(ask), ask)
