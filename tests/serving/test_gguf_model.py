"""The GGUF file of a GPT-2 is that GPT-2: the same logits and the same ids; the rest is refused."""

import copy
import json

import odd_tokenizers
import pytest
import torch
from architectures import tiny_model
from gguf import LlamaFileType, TokenType
from gguf_reader import GGUFModel
from hypothesis import given
from hypothesis import strategies as st
from support import KNOWN_WORDS
from tokenizers import AddedToken, processors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerFast

from common.loading import copy_sharing_weights
from common.serving.gguf_model import save_model_gguf
from common.vectors.steering_vector import SteeringVector
from repository.mechanisms import load_mechanism

TEXT = "I think dogs are charming, and my neighbour's garden is old."


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def noise(d_model: int, size: float) -> torch.Tensor:
    draw = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    return size * draw / draw.norm()


@pytest.fixture(scope="module")
def written(model, tokenizer, tmp_path_factory) -> GGUFModel:
    """The embedded model, as it is in the file."""
    path = tmp_path_factory.mktemp("gguf") / "embedded.gguf"
    save_model_gguf(model, tokenizer, path)
    return GGUFModel(path)


@pytest.fixture(scope="module")
def byte_level():
    return odd_tokenizers.gpt2()


def random_model(size: int, **options) -> GPT2LMHeadModel:
    """A GPT-2 in which no two widths are equal, so that no matrix fits the wrong way round."""
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_inner": 40, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, **shape | options)).eval()
    for weight in model.parameters():  # no bias is 0, no scale of a layer norm is 1
        nn.init.normal_(weight, std=0.3)
    return model


def test_the_file_gives_the_logits_of_the_model(model, tokenizer, written):
    ids = tokenizer(TEXT)["input_ids"]
    assert written.field("general.architecture") == "gpt2"
    assert written.field("general.name") == "embedded"
    assert written.field("general.file_type") == LlamaFileType.ALL_F32
    assert written.field("gpt2.context_length") == model.config.n_positions
    torch.testing.assert_close(written.logits(ids), logits_of(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.float32),
        ({"tie_word_embeddings": False}, torch.float32),
        ({"layer_norm_epsilon": 0.1}, torch.float32),
        ({"activation_function": "gelu_pytorch_tanh"}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=["own inner width", "embeddings of their own", "own epsilon", "other name", "16 bit"],
)
def test_any_gpt2_is_written(byte_level, tmp_path, options, dtype):
    """What a config can say; 16-bit weights are written as the same numbers in float32."""
    size = len(byte_level) + 3
    model = random_model(size, **options).to(dtype)
    save_model_gguf(model, byte_level, tmp_path / "model.gguf")
    ids, found = byte_level(TEXT)["input_ids"][:30], GGUFModel(tmp_path / "model.gguf")
    wanted = logits_of(copy.deepcopy(model).float(), ids)
    torch.testing.assert_close(found.logits(ids), wanted, atol=1e-4, rtol=1e-4)
    assert found.weights["token_embd.weight"].dtype == torch.float32
    assert found.field("general.name") == "GPT-2", "the model has no name of its own"
    for field, name in {  # llama.cpp expects shapes that the header says
        "context_length": "position_embd.weight",
        "feed_forward_length": "blk.1.ffn_up.weight",
        "embedding_length": "blk.1.ffn_down.weight",
    }.items():
        assert found.field(f"gpt2.{field}") == len(found.weights[name])
    assert len(found.field("tokenizer.ggml.tokens")) == size


@pytest.mark.parametrize("layer", [0, 3])
def test_a_steered_bias_is_written(model, tokenizer, tmp_path, layer):
    """The file of the edited model gives the steered logits, after block 0 too."""
    bias, path = load_mechanism("bias_editing"), tmp_path / "steered.gguf"
    vector, ids = noise(model.config.n_embd, 8.0), tokenizer(TEXT)["input_ids"]
    with bias.steer(copy_sharing_weights(model), layer, vector) as edited:
        save_model_gguf(edited, tokenizer, path)
    with SteeringVector({layer: vector}).apply(model):
        steered = logits_of(model, ids)
    found = GGUFModel(path).logits(ids)
    torch.testing.assert_close(found, steered, atol=1e-4, rtol=1e-4)
    assert (found - logits_of(model, ids)).abs().max() > 0.1


# --- the tokenizer ---


@given(text=st.text(max_size=30))
def test_any_text_has_the_same_ids(tokenizer, written, text):
    assert written.ids(text) == tokenizer(text)["input_ids"]


@given(
    words=st.lists(st.sampled_from([*KNOWN_WORDS, "<|endoftext|>", "'s", "\n", "1"]), max_size=8)
)
def test_known_words_have_the_same_ids(tokenizer, written, words):
    """Merges matter here: of most words one token is left."""
    for text in (" ".join(words), "".join(words)):
        assert written.ids(text) == tokenizer(text)["input_ids"]


def test_each_token_has_its_number_and_text(tokenizer, written):
    tokens = written.field("tokenizer.ggml.tokens")
    assert tokens == tokenizer.convert_ids_to_tokens(range(len(tokens)))
    assert written.field("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert written.field("tokenizer.ggml.model") == "gpt2"
    assert written.field("tokenizer.ggml.pre") == "gpt-2"


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3"])
def test_what_the_tokenizer_adds_is_written(tmp_path, kind):
    """BOS where it puts one before a text; tokens that were added, special or not."""
    tokenizer = odd_tokenizers.KINDS[kind]()
    tokenizer.add_tokens(["dogsdogs"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    found = GGUFModel(tmp_path / "model.gguf")
    for text in (TEXT, "<|turn|>I love dogsdogs<|turn|>", ""):
        assert found.ids(text) == tokenizer(text)["input_ids"]
    kinds = {
        "dogsdogs": TokenType.USER_DEFINED,
        "<|turn|>": TokenType.CONTROL,
        "a": TokenType.NORMAL,
    }
    types = found.field("tokenizer.ggml.token_type")
    for token, kind in kinds.items():
        assert types[tokenizer.convert_tokens_to_ids(token)] == kind


def test_the_end_of_text_is_written_where_it_is_added(byte_level, tmp_path):
    tokenizer = copy.deepcopy(byte_level)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    assert GGUFModel(tmp_path / "model.gguf").ids(TEXT) == tokenizer(TEXT)["input_ids"]


def test_affixes_that_are_empty_are_none(byte_level, tmp_path):
    """So older files say it."""
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    made = changed(byte_level, lambda parts: parts["model"].update(empty))
    save_model_gguf(random_model(len(made)), made, tmp_path / "model.gguf")
    assert GGUFModel(tmp_path / "model.gguf").ids(TEXT) == byte_level(TEXT)["input_ids"]


# --- what is refused ---


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokenizer.json was changed."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    made = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=tokenizer.eos_token)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
            "pre-tokenizer add_pre",
        ),
        (lambda parts: parts["pre_tokenizer"].update(use_regex=False), "pre-tokenizer use_regex"),
        (lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer type"),
        (lambda parts: parts.update(pre_tokenizer=None), "pre-tokenizer type"),
        (lambda parts: parts.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda parts: parts["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda parts: parts["model"].update(dropout=0.5), "dropout"),
        (lambda parts: parts["model"].update(byte_fallback=True), "byte_fallback"),
        (
            lambda parts: parts["model"].update(continuing_subword_prefix="#", merges=[]),
            "continuing_subw",
        ),
        (lambda parts: parts["model"].update(end_of_word_suffix="#"), "end_of_word_suffix"),
        (
            lambda parts: parts.update(
                model={"type": "WordLevel", "vocab": parts["model"]["vocab"], "unk_token": "a"}
            ),
            "type: 'BPE'",
        ),
        (lambda parts: parts["added_tokens"][0].update(lstrip=True), "lstrip of '<|endoftext|>'"),
        (lambda parts: parts["added_tokens"][0].update(rstrip=True), "rstrip of '<|endoftext|>'"),
    ],
)
def test_another_tokenizer_is_refused(byte_level, tmp_path, change, says):
    tokenizer = changed(byte_level, change)
    with pytest.raises(ValueError, match=f"BPE tokenizer like GPT-2's, with {says}") as refusal:
        save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    assert "other ids" in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Qwen"])
def test_the_tokenizers_of_other_models_are_refused(tmp_path, kind):
    tokenizer = odd_tokenizers.KINDS[kind]()
    with pytest.raises(ValueError, match="expected a byte-level BPE tokenizer like GPT-2's"):
        save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")


def test_tokenizers_that_do_not_fit_are_refused(byte_level, tmp_path):
    """Too many tokens, no end of text, letters of bytes that are missing, a BOS that is unknown."""
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match=f"token {len(byte_level) - 1} of the tokenizer is beyond"):
        save_model_gguf(random_model(len(byte_level) - 1), byte_level, path)
    model = random_model(len(byte_level))
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    with pytest.raises(ValueError, match="with an end of text"):
        save_model_gguf(model, endless, path)
    few = GPT2Tokenizer({"a": 0, "<|endoftext|>": 1}, [])
    with pytest.raises(ValueError, match="the letters of some bytes: 'all 256'"):
        save_model_gguf(model, few, path)
    odd = copy.deepcopy(byte_level)
    odd.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="! $A", special_tokens=[("!", odd.convert_tokens_to_ids("!"))]
    )
    with pytest.raises(ValueError, match="adds BOS, the end of text or nothing"):
        save_model_gguf(model, odd, path)
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(model, tokenizer, byte_level, tmp_path):
    """Other classes, other computations, hooks, replaced modules, weights that are not numbers."""
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="expected a GPT2LMHeadModel, got a LlamaForCausalLM"):
        save_model_gguf(tiny_model("Llama", 16), tokenizer, path)
    for entry, value in {
        "activation_function": "relu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True,
    }.items():
        with pytest.raises(ValueError, match=f"with {entry}=.*; this one has {value!r}"):
            save_model_gguf(random_model(len(byte_level), **{entry: value}), byte_level, path)
    vector = SteeringVector({2: noise(model.config.n_embd, 1.0)})
    with vector.apply(model), pytest.raises(ValueError, match="has a hook, .*no file holds"):
        save_model_gguf(model, tokenizer, path)
    wrapped = random_model(len(byte_level))
    wrapped.transformer.h[1].mlp = nn.Sequential(wrapped.transformer.h[1].mlp)
    with pytest.raises(ValueError, match=r"a module was replaced: see transformer\.h\.1\.mlp"):
        save_model_gguf(wrapped, byte_level, path)
    broken = random_model(len(byte_level))
    broken.transformer.ln_f.bias.data[3] = torch.nan
    with pytest.raises(
        ValueError, match=r"finite weights, got nan or inf in transformer\.ln_f\.bias"
    ):
        save_model_gguf(broken, byte_level, path)
    with pytest.raises(ValueError, match="is quantised or offloaded"):
        save_model_gguf(broken.to("meta"), byte_level, path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_kept(byte_level, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model_gguf(random_model(len(byte_level)), byte_level, path)
    assert path.read_text() == "mine"
    save_model_gguf(random_model(len(byte_level)), byte_level, path, overwrite=True)
    assert GGUFModel(path).field("gpt2.block_count") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_added_tokens_that_strip_are_refused(byte_level, tmp_path):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens([AddedToken("dogs", single_word=True)])
    with pytest.raises(ValueError, match="with single_word of 'dogs': False; this one has True"):
        save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "plain, special",
    [
        (["dogcat", "catfish"], []),  # "dogcatfish": from the left, or the longest first?
        (["a<x>b"], ["<x>"]),  # special tokens first, or the longest?
        (["aab", "aa", "ba"], []),
    ],
)
def test_added_tokens_that_overlap_are_refused(byte_level, tmp_path, plain, special):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    with pytest.raises(ValueError, match="with added tokens that overlap"):
        save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")


def test_added_tokens_inside_each_other_are_written(byte_level, tmp_path):
    """The longest is taken there and here: rows of spaces, a word and a longer one."""
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens(["  ", "   ", "dog", "hotdogs"])
    save_model_gguf(random_model(len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    found = GGUFModel(tmp_path / "model.gguf")
    for text in (*(f"a{n * ' '}b" for n in range(9)), "hotdogs hotdog"):
        assert found.ids(text) == tokenizer(text)["input_ids"]


def test_no_two_tokens_have_one_name(byte_level, tmp_path):
    """llama.cpp would end the process."""
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.add_tokens([f"[PAD{len(byte_level) + 2}]"])
    save_model_gguf(random_model(len(tokenizer) + 3), tokenizer, tmp_path / "model.gguf")
    tokens = GGUFModel(tmp_path / "model.gguf").field("tokenizer.ggml.tokens")
    assert len(set(tokens)) == len(tokens) == len(tokenizer) + 3


@pytest.mark.parametrize("name", ["my-Phi-3", "phi3", "modern-bert"])
def test_a_name_at_which_llama_cpp_changes_the_tokenizer_is_not_written(byte_level, tmp_path, name):
    model = random_model(len(byte_level))
    for called, written in ((name, "GPT-2"), ("mine", "mine")):
        model.config._name_or_path = called
        save_model_gguf(model, byte_level, tmp_path / "model.gguf", overwrite=True)
        assert GGUFModel(tmp_path / "model.gguf").field("general.name") == written


def test_weights_beyond_float32_are_refused(byte_level, tmp_path):
    model = random_model(len(byte_level)).double()
    model.transformer.ln_f.bias.data[3] = 1e300
    with pytest.raises(ValueError, match=r"got nan or inf in transformer\.ln_f\.bias"):
        save_model_gguf(model, byte_level, tmp_path / "model.gguf")


def test_the_template_of_chats_is_written(byte_level, tmp_path):
    """Without one llama.cpp and its bindings take another, each its own."""
    tokenizer = copy.deepcopy(byte_level)
    for template in (None, "{% for m in messages %}{{ m.content }}{% endfor %}"):
        tokenizer.chat_template = template
        path = tmp_path / "model.gguf"
        save_model_gguf(random_model(len(tokenizer)), tokenizer, path, overwrite=True)
        assert GGUFModel(path).field("tokenizer.chat_template") == template
