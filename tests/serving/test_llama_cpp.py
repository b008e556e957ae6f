"""llama.cpp steers as transformers does: the same ids, the same greedy texts, logits that are near.

`make engines` runs this, in an environment that has llama-cpp-python and llama-completion; the rows
that llama.cpp gets are checked in test_control_vector.py, without it.
"""

import shlex
import shutil
import subprocess
import unicodedata

import numpy as np
import odd_tokenizers
import pytest
import torch
from support import KNOWN_WORDS, PROMPTS
from transformers import GPT2Config, GPT2LMHeadModel

from common.loading import copy_sharing_weights
from common.serving.gguf_model import save_model_gguf
from common.serving.llama_cpp import steer_llama_cpp
from common.vectors.steering_vector import SteeringVector
from common.vectors.training import train_steering_vector
from repository.mechanisms import load_mechanism

pytestmark = pytest.mark.engines

# Of a logit. On a CPU llama.cpp looks the activation function up in a table of 16-bit floats, which
# has 11 digits in base 2; six blocks add up to a thousandth or two.
TOLERANCE = 0.01
NEW = 24  # tokens of a greedy text


@pytest.fixture(scope="module")
def engine():
    return pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not in this environment: run `make engines`"
    )


@pytest.fixture(scope="module")
def start(engine, tokenizer, tmp_path_factory):
    """Return what starts llama.cpp with a model, in float32 throughout."""

    def start(model):
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        save_model_gguf(model, tokenizer, path)
        return engine.Llama(
            str(path),
            n_ctx=model.config.n_positions,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=engine.GGML_TYPE_F32,
            type_v=engine.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )

    return start


@pytest.fixture(scope="module")
def llama(start, model):
    return start(model)


@pytest.fixture(scope="module")
def love(loaded) -> SteeringVector:
    """Love - Hate, of every layer, as long as the coefficient of the preset."""
    vector = train_steering_vector(loaded.model, loaded.tokenizer, [("Love", "Hate")])
    return loaded.preset.coeff * vector.unit()


def layers_of(model) -> list[int]:
    """The first layer that llama.cpp steers, one in the middle, the last."""
    last = model.config.n_layer - 1
    return [1, last // 2 + 1, last]


def logits(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


@torch.no_grad()
def expected_logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def text(llama, ids: list[int]) -> list[int]:
    """The greedy text of llama.cpp, up to the end of text or `NEW` tokens."""
    found = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == llama.token_eos() or len(found) == NEW:
            break
        found.append(token)
    return found


def same_text(llama, model, ids: list[int]) -> bool:
    """Say whether llama.cpp and transformers write the same greedy text, as each is steered now.

    It asserts that they part only at a tie: logits that differ by less than TOLERANCE cannot choose
    another token, unless the two best are nearer to each other than twice that.
    """
    found, end = text(llama, ids), model.generation_config.eos_token_id
    new = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
    wanted = [token for token in new.tolist() if token != end]
    if found == wanted:
        return True
    shared = 0
    while [*found, end][shared] == [*wanted, end][shared]:
        shared += 1
    choice = expected_logits(model, ids + wanted[:shared])[-1]
    tie = (choice.max() - choice[[*found, end][shared]]).item()
    assert tie < 2 * TOLERANCE, f"after {shared} tokens the choice is {tie} below the best"
    return False


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return (found - wanted).abs().max().item()


# --- the tokenizer ---


def odd_texts() -> list[str]:
    """Words, spaces, apostrophes, scripts, marks, emoji, controls: all that splits a text."""
    letters = [
        chr(number)
        for number in range(0, 0x30000, 151)
        if unicodedata.category(chr(number)) not in ("Cs", "Cn", "Co")
    ]
    rows = ["".join(letters[start : start + 6]) for start in range(0, len(letters), 6)]
    spaces = [" ", "  ", "\n", "\n\n", " \n", "\t", "\u00a0", "\u2003", "\u3000", "\x0b", "\r\n"]
    rows += [f"I{space}love{space}" for space in spaces] + spaces
    rows += [f"{word}{mark}{word}" for word in KNOWN_WORDS for mark in (" ", "", "'s ", "-", " 12")]
    rows += ["you're I'll they've I'd 'tis 'S don''t ' '", "<|endoftext|>", "a<|endoftext|> b"]
    rows += ["½ ² Ⅷ ٣ 五 1,000.50", "e\u0301 é ﬁ ß İ", "👩\u200d👩\u200d👧 🇩🇪 ❤️", "\x00a\x07", ""]
    rows += [
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
        "مرحبا بالعالم",
        "שלום",
        "你好，世界",
        "こんにちは",
        "안녕",
    ]
    return rows


def test_ids_are_the_same(llama, tokenizer):
    texts = odd_texts()
    assert len(set(texts)) >= 200
    for given in texts:
        ids = llama.tokenize(given.encode(), add_bos=True, special=True)
        assert ids == tokenizer(given)["input_ids"], repr(given)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3"])
def test_ids_of_other_tokenizers_are_the_same(engine, tmp_path, kind):
    """Another vocabulary, BOS before a text or none, tokens that were added."""
    tokenizer = odd_tokenizers.KINDS[kind]()
    tokenizer.add_tokens(["dogsdogs"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + 2, **shape))
    save_model_gguf(model, tokenizer, tmp_path / "model.gguf")
    llama = engine.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for given in [*odd_texts(), "<|turn|>I love dogsdogs <|turn|> dogs"]:
        ids = llama.tokenize(given.encode(), add_bos=True, special=True)
        assert ids == tokenizer(given)["input_ids"], repr(given)


def test_bytes_come_back(llama, tokenizer):
    for given in odd_texts():
        ids = tokenizer(given)["input_ids"]
        assert llama.detokenize(ids, special=True).decode() == given


# --- the model ---


@pytest.mark.parametrize("prompt", PROMPTS)
def test_unsteered_it_is_the_same_model(llama, model, tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    assert distance(logits(llama, ids), expected_logits(model, ids)) < TOLERANCE
    same_text(llama, model, ids)


@pytest.mark.parametrize("share", [-1.0, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_steered_texts_are_the_same(llama, model, tokenizer, love, depth, share):
    """Three layers, five coefficients; steering moves the logits far more than they differ."""
    vector, same = love.select([layers_of(model)[depth]]), 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        with steer_llama_cpp(llama, vector, share), vector.apply(model, multiplier=share):
            found = logits(llama, ids)
            assert distance(found, expected_logits(model, ids)) < TOLERANCE
            same += same_text(llama, model, ids)
        moved = distance(found, expected_logits(model, ids))
        assert moved > 20 * TOLERANCE if share else moved < TOLERANCE
    assert same >= len(PROMPTS) - 1, "ties are rare"


def test_several_layers_at_once(llama, model, tokenizer, love):
    """All that llama.cpp takes, and some of them."""
    every = love.select(range(1, model.config.n_layer)) / (model.config.n_layer - 1)
    for vector in (every, every.select(layers_of(model))):
        for sign in (1.0, -1.0):
            ids = tokenizer(PROMPTS[0])["input_ids"]
            with steer_llama_cpp(llama, vector, sign), vector.apply(model, multiplier=sign):
                assert distance(logits(llama, ids), expected_logits(model, ids)) < TOLERANCE
                same_text(llama, model, ids)


def test_a_layer_is_our_layer(llama, model, tokenizer, love):
    """Vector N of llama.cpp is added after our block N: the layers beside it are far away."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    wanted = {}
    for layer in range(model.config.n_layer):
        with SteeringVector({layer: love.layer_activations[2]}).apply(model):
            wanted[layer] = expected_logits(model, ids)
    for layer in range(1, model.config.n_layer):
        with steer_llama_cpp(llama, SteeringVector({layer: love.layer_activations[2]})):
            found = logits(llama, ids)
        near = [ours for ours in wanted if distance(found, wanted[ours]) < 10 * TOLERANCE]
        assert near == [layer] and distance(found, wanted[layer]) < TOLERANCE


def test_afterwards_it_is_as_before(llama, model, tokenizer, love):
    """Also with the same prompt, whose keys are steered, after an error, and a shorter vector."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    before = text(llama, ids)
    last = model.config.n_layer - 1
    with steer_llama_cpp(llama, love.select([1, last])):
        steered = text(llama, ids)
    assert steered != before and text(llama, ids) == before
    with pytest.raises(TypeError), steer_llama_cpp(llama, love.select([1])):
        text(llama, None)
    assert text(llama, ids) == before
    with steer_llama_cpp(llama, love.select([1])), love.select([1]).apply(model):
        assert distance(logits(llama, ids), expected_logits(model, ids)) < TOLERANCE


def test_what_cannot_be_steered_is_refused(engine, llama, model, tokenizer, love):
    """Layer 0, layers that are not there, a second vector, a cache; nothing is steered by them."""
    ids, last = tokenizer(PROMPTS[0])["input_ids"], model.config.n_layer - 1
    before = text(llama, ids)

    def refused(vector, says):
        with pytest.raises(ValueError, match=says), steer_llama_cpp(llama, vector):
            pass

    refused(love, "layers from 1 on, and this one has 0: keep the others")
    refused(SteeringVector({last + 1: love.layer_activations[1]}), f"layer {last + 1} does not exi")
    with steer_llama_cpp(llama, love.select([1])):
        refused(love.select([2]), "steered already: add the vectors up")
        assert text(llama, ids) != before
    with pytest.raises(ValueError, match="a llama_cpp.Llama, got a str"):
        steer_llama_cpp("model.gguf", love.select([1])).__enter__()
    llama.set_cache(engine.LlamaRAMCache())
    refused(love.select([1]), "has a cache")
    llama.set_cache(None)
    assert text(llama, ids) == before


def test_a_model_that_is_closed_is_refused(start, model, love):
    """And one that is closed inside the block ends it as any other."""
    closed, vector = start(model), love.select([1])
    with steer_llama_cpp(closed, vector):
        closed.close()
    with pytest.raises(ValueError, match="the model is closed"), steer_llama_cpp(closed, vector):
        pass


def test_a_cache_that_is_set_inside_ends_with_the_block(engine, llama, model, tokenizer, love):
    """Its texts are steered, and would come back."""
    ids = tokenizer(PROMPTS[0])["input_ids"]

    def complete() -> str:
        options = {"max_tokens": 8, "temperature": 0.0, "repeat_penalty": 1.0}
        return llama.create_completion(ids, **options)["choices"][0]["text"]

    before = complete()
    with steer_llama_cpp(llama, love.select([2])):
        llama.set_cache(engine.LlamaRAMCache())
        assert complete() != before
    assert complete() == before


# --- without a control vector ---


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_steered_bias_needs_no_control_vector(start, model, tokenizer, love, layer, sign):
    """The unsteered engine with the edited checkpoint writes what the steered model writes."""
    vector = (sign * love).select([layer])
    bias = load_mechanism("bias_editing")
    with bias.steer(copy_sharing_weights(model), layer, vector.layer_activations[layer]) as edited:
        engine, same = start(edited), 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        with vector.apply(model):
            assert distance(logits(engine, ids), expected_logits(model, ids)) < TOLERANCE
            same += same_text(engine, model, ids)
        assert distance(logits(engine, ids), expected_logits(model, ids)) > 20 * TOLERANCE
    assert same >= len(PROMPTS) - 1, "ties are rare"


# --- the command line ---


@pytest.fixture(scope="module")
def program() -> str:
    found = shutil.which("llama-completion")
    if not found:
        pytest.skip("llama-completion is not on the PATH: run `make engines`")
    return found


@pytest.mark.parametrize("share", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("which", ["one layer", "all layers"])
def test_the_command_steers(program, llama, model, tokenizer, love, tmp_path, which, share):
    """A program of llama.cpp with the file of `save_gguf` writes what the bindings write."""
    layers = [2] if which == "one layer" else range(1, model.config.n_layer)
    vector = love.select(layers) / len(layers)
    vector.save_gguf(tmp_path / "love hate.gguf")
    save_model_gguf(model, tokenizer, tmp_path / "model.gguf")
    command = vector.llama_cpp_command(
        tmp_path / "love hate.gguf", share, tmp_path / "model.gguf", program
    )
    # It prints from another thread, and may end before the last tokens are printed: ask for more
    # than is compared, and past the end of text.
    options = f"-n {3 * NEW} --ignore-eos --temp 0 -no-cnv -ctk f32 -ctv f32 -fa off -t 1"
    moved = []
    for prompt in PROMPTS:
        run = subprocess.run(
            [*shlex.split(command), *options.split(), "--simple-io", "--prompt", prompt],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        ids = tokenizer(prompt)["input_ids"]
        with steer_llama_cpp(llama, vector, share):
            wanted = tokenizer.decode(ids + text(llama, ids))
        assert run.stdout.startswith(wanted)
        moved.append(wanted != tokenizer.decode(ids + text(llama, ids)))
    assert any(moved)
