"""The trials behind the matrix of abilities: each tries one mechanism and says what went wrong.

A trial gets a `Subject` and raises `Silently` where something else happened without an error. The
truth it compares with comes from elsewhere: the plain hook on another copy of the model, or the
library in `common`.
"""

import copy
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    pipeline,
)

from benchmarks.ability_subject import (
    NEW,
    PROMPTS,
    Elsewhere,
    Silently,
    Subject,
    embedded_model,
    embedded_subject,
    expect,
    expect_steered,
)
from common import embedded
from common.passes.hooks import holder_of_blocks, hook_passes
from common.places.blocks import get_block
from common.places.positions import PositionTracker, TokenSelection, TokenSpan, with_position_ids
from common.places.sites import Site
from common.texts.generation import generate, logits
from common.vectors.activation_additions import SpanHook, adding_spans
from common.vectors.operators import ablation_operator
from common.vectors.steering_vector import SteeringVector
from repository.mechanisms import MECHANISMS, ROOT, load_mechanism

FIRST = 2  # the first token that is steered where only later ones are
LAST = -2  # likewise, counted from the end of the prompt


# --- where and how ---


def all_positions(subject: Subject) -> None:
    """Every position of every row, and the model as before afterwards."""
    with subject.steer():
        expect_steered(subject, subject.logits())
        ids = subject.generate()
    expect(
        ids,
        subject.steered(lambda model: generate(model, subject.inputs, max_new_tokens=NEW)),
        "other tokens are generated",
    )
    expect(subject.logits(), subject.unsteered_logits(), "still steered afterwards")


@contextmanager
def following(subject: Subject, selection: TokenSelection | TokenSpan) -> Iterator[PositionTracker]:
    """Let a tracker of absolute positions follow the passes of the model, cached ones too."""
    tracker = PositionTracker(holder_of_blocks(subject.module), selection)
    handle = hook_passes(subject.module, tracker)
    try:
        yield tracker
    finally:
        handle.remove()


@contextmanager
def steered_from(
    subject: Subject, first: int, waits: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Steer one token of the prompt and all later ones; call `waits` when a pass gets there."""

    def change(hidden: Tensor) -> Tensor:
        waits()
        moved = hidden + subject.vector
        return moved if tracker.mask is None else torch.where(tracker.mask, moved, hidden)

    with following(subject, TokenSelection(first)) as tracker, subject.intervene(change):
        yield


def expect_as_plain(subject: Subject, scores: Tensor, ids: Tensor) -> None:
    """Fail unless logits and ids are those of the plain copy, as it is steered now."""
    expected = logits(subject.plain, subject.inputs)[subject.real]
    expect(scores, expected, "other positions are steered")
    expected = generate(subject.plain, subject.inputs, max_new_tokens=NEW)
    expect(ids, expected, "other tokens are generated")


def later_positions(subject: Subject) -> None:
    """Token 2 and all later ones, with a KV cache and padding."""
    vector = SteeringVector({subject.layer: subject.vector})
    with steered_from(subject, FIRST):
        scores, ids = subject.logits(), subject.generate()
    with vector.apply(subject.plain, min_token_index=FIRST):
        expect_as_plain(subject, scores, ids)


def front_additions(subject: Subject) -> None:
    """One vector for each of the first tokens of every row, as activation additions do."""
    vectors = torch.stack([subject.vector, -subject.vector])
    span = TokenSpan(len(vectors), "front")
    with following(subject, span) as tracker, subject.intervene(SpanHook(vectors, tracker).steer):
        scores, ids = subject.logits(), subject.generate()
    with adding_spans(
        subject.plain, {(Site(subject.layer, "resid_post"), len(vectors)): vectors}, "front"
    ):
        expect_as_plain(subject, scores, ids)


def ablation(subject: Subject) -> None:
    """The component along the vector is taken away."""
    operator = ablation_operator()
    with subject.intervene(lambda hidden: hidden + operator(hidden, subject.vector)):
        scores = subject.logits()
    with SteeringVector({subject.layer: subject.vector}).apply(subject.plain, operator=operator):
        expect(
            scores,
            logits(subject.plain, subject.inputs)[subject.real],
            "something else than ablation",
        )


def coefficient_for_each_row(subject: Subject) -> None:
    """Each row of one batch is steered by a coefficient of its own."""
    coeffs = torch.tensor([1.0, 0.0, -1.0])
    rows = coeffs[:, None, None] * subject.vector  # [batch, 1, d_model]
    with subject.intervene(lambda hidden: hidden + rows):
        scores = subject.mechanism.logits(subject.wrapped, subject.inputs)
    for row, coeff in enumerate(coeffs):
        with SteeringVector({subject.layer: coeff * subject.vector}).apply(subject.plain):
            alone = logits(subject.plain, subject.inputs)[row]
        expect(
            scores[row][subject.real[row]],
            alone[subject.real[row]],
            "a row has the coefficient of another",
        )


def two_vectors(subject: Subject) -> None:
    """Two vectors at one layer and a third at another; each is taken away by itself."""
    places = [(1, subject.vector), (4, -subject.vector), (1, subject.vector.roll(1))]
    with ExitStack() as mine, ExitStack() as theirs:
        for layer, vector in places:
            mine.enter_context(subject.mechanism.steer(subject.wrapped, layer, vector))
            theirs.enter_context(SteeringVector({layer: vector}).apply(subject.plain))
        expect(
            subject.logits(),
            logits(subject.plain, subject.inputs)[subject.real],
            "the vectors do not add up",
        )
    expect(subject.logits(), subject.unsteered_logits(), "still steered afterwards")


# --- generation ---


def beam_search(subject: Subject) -> None:
    """`num_beams=3`."""
    options = {"max_new_tokens": 2 * NEW, "num_beams": 3}
    with subject.steer():
        ids = subject.mechanism.generate(subject.wrapped, subject.inputs, **options)
    beams, greedy = (
        subject.steered(
            lambda model, count=count: generate(
                model, subject.inputs, **options | {"num_beams": count}
            )
        )
        for count in (3, 1)
    )
    assert beams.tolist() != greedy.tolist(), "these prompts do not tell beams from greedy decoding"
    expect(
        ids,
        beams,
        (
            "greedy decoding, and no error"
            if ids.tolist() == greedy.tolist()
            else "other tokens than by a hook"
        ),
    )


def assisted_decoding(subject: Subject) -> None:
    """An unsteered model drafts, the steered one decides: the text is the steered one's."""
    one = subject.tokenizer(PROMPTS[0], return_tensors="pt")  # assisted generation takes one row
    drafts: list[int] = []
    counting = subject.plain.register_forward_pre_hook(lambda module, args: drafts.append(1))
    with subject.steer():
        ids = subject.mechanism.generate(
            subject.wrapped, one, max_new_tokens=NEW, assistant_model=subject.plain
        )
    counting.remove()
    if not drafts:
        raise Silently("the assistant is ignored, and no error")
    steered, unsteered = (
        subject.steered(lambda model: generate(model, one, max_new_tokens=NEW)),
        generate(subject.plain, one, max_new_tokens=NEW),
    )
    assert steered.tolist() != unsteered.tolist(), (
        "this prompt does not tell steered from unsteered"
    )
    expect(ids, steered, "other tokens than the steered model's own")


def expect_from_the_end(
    subject: Subject, inputs: BatchEncoding, passes: Callable[[list[int]], bool], **options
) -> None:
    """Steer the last two tokens of the prompt and later ones; compare with plain passes.

    `passes` says whether the passes, by their numbers of tokens, are those that were asked for.
    """
    subject.mechanism.generate(
        subject.wrapped, inputs, max_new_tokens=1
    )  # the first one tries what may share a batch
    widths: list[int] = []
    counting = get_block(subject.module, subject.layer).register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    try:
        with steered_from(subject, LAST):
            ids = subject.mechanism.generate(
                subject.wrapped, inputs, max_new_tokens=2 * NEW, **options
            )
    finally:
        counting.remove()
    if not passes(widths):
        raise Silently("the option is ignored, and no error")
    with SteeringVector({subject.layer: subject.vector}).apply(subject.plain, min_token_index=LAST):
        expected = generate(subject.plain, inputs, max_new_tokens=2 * NEW)
    assert expected.tolist() != generate(subject.plain, inputs, max_new_tokens=2 * NEW).tolist(), (
        "nothing of it is felt"
    )
    expect(ids, expected, "other tokens than with the prompt in one pass")


def chunked_prefill(subject: Subject) -> None:
    """The last two tokens of the prompt and all later ones, `prefill_chunk_size=1`."""
    expect_from_the_end(
        subject, subject.inputs, lambda widths: set(widths) == {1}, prefill_chunk_size=1
    )


def prompt_lookup(subject: Subject) -> None:
    """`prompt_lookup_num_tokens=4`: guesses go with the prompt; its last two tokens are steered."""
    one = subject.tokenizer(f"{PROMPTS[2]} hill. {PROMPTS[2]}", return_tensors="pt")
    expect_from_the_end(
        subject,
        one,
        lambda widths: widths[0] > one["input_ids"].shape[1],
        prompt_lookup_num_tokens=4,
    )


def text_generation_pipeline(subject: Subject) -> None:
    """`transformers.pipeline("text-generation", model=...)`."""

    def write(model: nn.Module) -> str:
        generator = pipeline(
            "text-generation", model=model, tokenizer=subject.tokenizer, device="cpu"
        )
        return generator(PROMPTS[0], max_new_tokens=NEW, do_sample=False)[0]["generated_text"]

    expected, unsteered = subject.steered(write), write(subject.plain)
    assert expected != unsteered, "this prompt does not tell steered from unsteered"
    with subject.steer():
        found = write(subject.module)
    if found != expected:
        raise Silently(
            "unsteered, and no error" if found == unsteered else "another text than by a hook"
        )


# --- training, compiling, exporting ---


def _gradient_by_hook(subject: Subject) -> Tensor:
    """The gradient of a loss by the vector [d_model], through a plain hook."""
    vector = subject.vector.clone().requires_grad_()
    with load_mechanism("custom_wrapper").steer(subject.plain, subject.layer, vector):
        subject.plain(**with_position_ids(subject.inputs)).logits[:, -1].logsumexp(
            -1
        ).sum().backward()
    return vector.grad


def gradient(subject: Subject) -> None:
    """The gradient of a loss by the vector, so that it can be learned by gradient descent."""
    vector = subject.vector.clone().requires_grad_()
    with subject.mechanism.steer(subject.wrapped, subject.layer, vector):
        scores = subject.mechanism.logits.__wrapped__(
            subject.wrapped, subject.inputs
        )  # without torch.no_grad
        scores[:, -1].logsumexp(-1).sum().backward()
    if vector.grad is None:
        raise Silently("the vector gets no gradient, and no error")
    expect(vector.grad, _gradient_by_hook(subject), "another gradient")


def gradient_of_the_bias(subject: Subject) -> None:
    """The gradient that the edited bias gets, `mlp.c_proj.bias.grad`, is that of the vector."""
    with subject.steer():
        bias = get_block(subject.module, subject.layer).mlp.c_proj.bias
        subject.module(**with_position_ids(subject.inputs)).logits[:, -1].logsumexp(
            -1
        ).sum().backward()
    expect(bias.grad, _gradient_by_hook(subject), "another gradient")


@contextmanager
def compiled(module: nn.Module, fullgraph: bool = True) -> Iterator[nn.Module]:
    """Compile a model as one graph, which runs as it is: no machine code is made of it."""
    torch.compiler.reset()
    try:
        yield torch.compile(module, fullgraph=fullgraph, backend="eager")
    finally:
        torch.compiler.reset()


@torch.no_grad()
def _compiled_logits(subject: Subject, fast: nn.Module) -> Tensor:
    return fast(**with_position_ids(subject.inputs), use_cache=False).logits[subject.real]


def compile_while_steered(subject: Subject) -> None:
    """`torch.compile(model, fullgraph=True)` inside the block."""
    with subject.steer(), compiled(subject.module) as fast:
        expect_steered(subject, _compiled_logits(subject, fast))


def compile_in_parts(subject: Subject) -> None:
    """Without `fullgraph=True`: compiled in parts."""
    with subject.steer(), compiled(subject.module, fullgraph=False) as fast:
        expect_steered(subject, _compiled_logits(subject, fast))


def steer_what_is_compiled(subject: Subject) -> None:
    """A model that was compiled and has run is steered, and no longer when the block ends."""
    with compiled(subject.module) as fast:
        expect(
            _compiled_logits(subject, fast),
            subject.unsteered_logits(),
            "wrong before it is steered",
        )
        with subject.steer():
            expect_steered(subject, _compiled_logits(subject, fast))
        expect(
            _compiled_logits(subject, fast), subject.unsteered_logits(), "still steered afterwards"
        )


def compile_with_guards(subject: Subject) -> None:
    """`torch._dynamo.config.skip_nnmodule_hook_guards = False`, before compiling."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        steer_what_is_compiled(subject)


@torch.no_grad()
def export(subject: Subject) -> None:
    """`torch.export` of the steered model: the program is steered without hooks or library."""
    inputs = {**with_position_ids(subject.inputs), "use_cache": False}
    with subject.steer():
        program = torch.export.export(subject.module, (), inputs, strict=False)
    expect_steered(subject, program.module()(**inputs).logits[subject.real])


# --- files and copies ---


@cache
def _saved_and_loaded() -> dict[str, Tensor | str]:
    """Save under each mechanism, load all in one fresh process with transformers alone.

    Under its name the embedded model, under its name and "llama" a Llama.
    """
    found: dict[str, Tensor | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for saved in [name + which for name in MECHANISMS for which in ("", " llama")]:
            subject = embedded_subject(saved.split()[0])
            try:
                subject = _on(tiny_llama, subject) if "llama" in saved else subject
                with subject.steer():
                    subject.module.save_pretrained(Path(folder, saved))
            except Exception as error:
                found[saved] = f"{type(error).__name__}: {error}"
        command = [sys.executable, "-m", "benchmarks.ability_processes", "load", folder]
        given = json.dumps(
            {key: value.tolist() for key, value in with_position_ids(subject.inputs).items()}
        )
        answer = subprocess.run(
            command, input=given, capture_output=True, text=True, cwd=ROOT, check=True
        )
        for saved, scores in json.loads(answer.stdout.splitlines()[-1]).items():
            found.setdefault(saved, scores if isinstance(scores, str) else torch.tensor(scores))
    return found


def saved_llama(subject: Subject) -> None:
    """The same with a Llama, whose linear layers have no bias."""
    saved_and_loaded(_on(tiny_llama, subject), " llama")


def saved_and_loaded(subject: Subject, which: str = "") -> None:
    """`save_pretrained` inside the block, `from_pretrained` in a fresh process without us."""
    scores = _saved_and_loaded()[subject.mechanism.name + which]
    if isinstance(scores, str):
        raise Elsewhere(scores)
    expect_steered(
        subject,
        scores[subject.real],
        "the weights of the steered block are missing and were drawn at random",
    )


def deep_copy(subject: Subject) -> None:
    """`copy.deepcopy` inside the block: the copy stays steered, and the original does not."""
    with subject.steer():
        twin = copy.deepcopy(subject.wrapped)
    expect(subject.logits(), subject.unsteered_logits(), "the original is still steered")
    expect_steered(subject, subject.mechanism.logits(twin, subject.inputs)[subject.real])


def pickled(subject: Subject) -> None:
    """`pickle` inside the block, and back."""
    with subject.steer():
        twin = pickle.loads(pickle.dumps(subject.wrapped))
    expect_steered(subject, subject.mechanism.logits(twin, subject.inputs)[subject.real])


# --- other models, and models in other places ---


def _tiny(config: transformers.PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    return model


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


@cache
def tiny_llama() -> PreTrainedModel:
    """A Llama with random weights: linear layers without bias, rotary positions."""
    return _tiny(LlamaConfig(**SIZES, vocab_size=len(embedded_model().tokenizer)))


@cache
def tiny_neox() -> PreTrainedModel:
    """A GPT-NeoX with random weights: attention and MLP side by side."""
    return _tiny(GPTNeoXConfig(**SIZES, vocab_size=len(embedded_model().tokenizer)))


def _on(model: Callable[[], PreTrainedModel], subject: Subject) -> Subject:
    """The same mechanism on a tiny model."""
    return Subject(subject.mechanism, model(), subject.tokenizer, 1)


def other_architecture(model: Callable[[], PreTrainedModel]) -> Callable[[Subject], None]:
    """The trial of all positions, on another model."""

    def trial(subject: Subject) -> None:
        all_positions(_on(model, subject))

    return trial


def _quantized(module: nn.Module) -> nn.Module:
    """A copy whose linear layers are int8, quantised as they run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this to torchao
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def quantized(subject: Subject) -> None:
    """A model of dynamic int8 linear layers, steered."""
    # One prompt: these layers round by the range of the whole batch, so that rows disturb each
    # other.
    expect_quantized_steered(
        Subject(subject.mechanism, _quantized(tiny_llama()), subject.tokenizer, 1, PROMPTS[:1])
    )


def expect_quantized_steered(subject: Subject) -> None:
    """All positions of an int8 model move by the vector."""
    before = subject.mechanism.read(subject.wrapped, subject.inputs, 1)
    with subject.steer():
        moved = subject.mechanism.read(subject.wrapped, subject.inputs, 1) - before
        expect(moved, subject.vector.expand_as(moved), "not moved by the vector")
        expect_steered(subject, subject.logits())


def steered_then_quantized(subject: Subject) -> None:
    """Steer first, then quantise: the bias goes into the int8 layer."""
    llama = Subject(subject.mechanism, tiny_llama(), subject.tokenizer, 1)
    with llama.steer():
        steered = _quantized(llama.module)
    before = subject.mechanism.read(_quantized(tiny_llama()), subject.inputs, 1)
    moved = subject.mechanism.read(steered, subject.inputs, 1) - before
    expect(moved, llama.vector.expand_as(moved), "not moved by the vector")


def offloaded_to_disk(subject: Subject) -> None:
    """`device_map` puts the steered block and another on disk; accelerate loads them to run."""
    device_map = {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {
        f"transformer.h.{layer}": "disk" if layer in (subject.layer, 0) else "cpu"
        for layer in range(6)
    }
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            embedded.FOLDER, dtype=torch.float32, device_map=device_map, offload_folder=folder
        ).eval()
        wrapped = subject.mechanism.wrap(model, subject.tokenizer)
        with subject.mechanism.steer(wrapped, subject.layer, subject.vector):
            expect_steered(subject, subject.mechanism.logits(wrapped, subject.inputs)[subject.real])
        expect(
            subject.mechanism.logits(wrapped, subject.inputs)[subject.real],
            subject.unsteered_logits(),
            "still steered afterwards",
        )


@cache
def _in_two_processes() -> dict[str, Tensor | str]:
    """Return logits of every mechanism on a Llama split between two processes, or the error."""
    subject = Subject(load_mechanism("pytorch_hooks"), tiny_llama(), embedded_model().tokenizer, 1)
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama().save_pretrained(folder)
        subject.tokenizer.save_pretrained(folder)
        command = [sys.executable, "-m", "benchmarks.ability_processes", "parallel", folder]
        given = {
            "layer": 1,
            "vector": subject.vector.tolist(),
            "prompts": PROMPTS,
            "names": MECHANISMS,
        }
        Path(folder, "given.json").write_text(json.dumps(given))
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300)
        answers = json.loads(Path(folder, "answers.json").read_text())
    return {
        name: scores if isinstance(scores, str) else torch.tensor(scores)
        for name, scores in answers.items()
    }


def tensor_parallel(subject: Subject) -> None:
    """Two processes with gloo, each with half of every layer (`tp_plan="auto"`)."""
    scores = _in_two_processes()[subject.mechanism.name]
    if isinstance(scores, str):
        raise Elsewhere(scores)
    expect_steered(
        Subject(load_mechanism("pytorch_hooks"), tiny_llama(), subject.tokenizer, 1), scores
    )


# --- threads ---


def one_thread_steers(subject: Subject) -> None:
    """Two threads use one object, one of them steered: the other must not be."""
    steering, done, found = threading.Event(), threading.Event(), []

    def steer_meanwhile() -> None:
        with subject.steer():
            found.append(subject.logits())
            steering.set()
            done.wait(60)

    other = threading.Thread(target=steer_meanwhile)
    other.start()
    try:
        steering.wait(60)
        scores = subject.logits()
    finally:
        done.set()
        other.join()
    expect_steered(subject, found[0])
    expect(scores, subject.unsteered_logits(), "the other thread is steered too")


def a_copy_for_each_thread(subject: Subject) -> None:
    """`copy_sharing_weights(model)` for each thread: own modules, the same weights."""
    other = Subject(subject.mechanism, subject.model, subject.tokenizer, subject.layer)
    _ = subject.wrapped, other.wrapped  # both are made before the threads run
    found: dict[str, list[Tensor]] = {"steered": [], "unsteered": []}
    together = threading.Barrier(2, timeout=60)

    def run(label: str, which: Subject) -> None:
        together.wait()
        with which.steer() if label == "steered" else ExitStack():
            found[label] += [which.logits() for _ in range(5)]

    threads = [
        threading.Thread(target=run, args=item)
        for item in (("steered", subject), ("unsteered", other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if [len(scores) for scores in found.values()] != [5, 5]:
        raise RuntimeError("a thread ended with an error")
    for steered, unsteered in zip(*found.values(), strict=True):
        expect_steered(subject, steered)
        expect(unsteered, subject.unsteered_logits(), "the other thread is steered too")


def two_threads(subject: Subject) -> None:
    """Two threads read prompts of different lengths while some positions are steered."""
    inputs = [subject.tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS[:2]]
    together, found = threading.Barrier(2, timeout=20), {}

    def run(number: int) -> None:
        try:
            found[number] = subject.mechanism.logits(subject.wrapped, inputs[number])
        except threading.BrokenBarrierError:
            pass  # the other one has failed
        except Exception as error:
            found[number] = error
            together.abort()

    with steered_from(subject, LAST, together.wait):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, scores in found.items():
        if isinstance(scores, Exception):
            raise scores
        with SteeringVector({subject.layer: subject.vector}).apply(
            subject.plain, min_token_index=LAST
        ):
            expect(
                scores,
                logits(subject.plain, inputs[number]),
                "steered at the positions of the other thread",
            )


class Trial(NamedTuple):
    """A trial, and for some mechanisms the one with the lines that help."""

    trial: Callable[[Subject], None]
    helps: Mapping[str, Callable[[Subject], None]] = MappingProxyType({})


BRIDGE, HOOKS = "transformer_lens", ("custom_wrapper", "pytorch_hooks", "baukit")
TRIALS: dict[str, Trial] = {
    "all positions": Trial(all_positions),
    "only later positions": Trial(later_positions),
    "additions at the front": Trial(front_additions),
    "another operator (ablation)": Trial(ablation),
    "a coefficient for each row": Trial(coefficient_for_each_row),
    "two vectors at once": Trial(two_vectors),
    "beam search": Trial(beam_search),
    "assisted decoding": Trial(assisted_decoding),
    "chunked prefill": Trial(chunked_prefill),
    "prompt lookup": Trial(prompt_lookup),
    "transformers.pipeline": Trial(text_generation_pipeline),
    "gradient through the vector": Trial(gradient, {"bias_editing": gradient_of_the_bias}),
    "torch.compile while steered": Trial(compile_while_steered, {BRIDGE: compile_in_parts}),
    "steered after torch.compile": Trial(
        steer_what_is_compiled, dict.fromkeys(HOOKS, compile_with_guards)
    ),
    "torch.export": Trial(export),
    "saved, run in a fresh process": Trial(saved_and_loaded),
    "saved, a Llama": Trial(saved_llama),
    "int8 linear layers": Trial(quantized, {"bias_editing": steered_then_quantized}),
    "blocks offloaded to disk": Trial(offloaded_to_disk),
    "two processes (tensor parallel)": Trial(tensor_parallel),
    "threads: the other unsteered": Trial(
        one_thread_steers, dict.fromkeys(MECHANISMS, a_copy_for_each_thread)
    ),
    "two threads": Trial(two_threads),
    "a Llama": Trial(other_architecture(tiny_llama)),
    "a GPT-NeoX": Trial(other_architecture(tiny_neox)),
    "deep copy stays steered": Trial(deep_copy),
    "pickle stays steered": Trial(pickled),
}
