"""The notebooks' cells as callables, and what single mechanisms can do beyond the contract."""

import ast
import copy
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import nbformat
import pytest
import torch
from accelerate import cpu_offload
from nbformat.v4 import new_code_cell, new_notebook
from support import PROMPTS
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from common.checking.pristine import assert_pristine, differences, snapshot
from common.loading import copy_sharing_weights
from common.places.blocks import get_block, get_hidden, with_hidden
from common.places.positions import with_position_ids
from common.texts.generation import logits
from repository import agreement as love_hate
from repository.mechanisms import (
    MECHANISMS,
    Mechanism,
    load_mechanism,
    mechanism_cells,
    notebook_namespace,
    run_cells,
)
from repository.notebooks import notebook_paths

FUNCTIONS = Mechanism._fields[1:6]  # those that every mechanism has


# Loading.


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write a notebook of cells that are given as (source, tags)."""

    def write(name: str, *cells: tuple[str, list[str]]) -> Path:
        notebook = new_notebook(
            cells=[new_code_cell(source, metadata={"tags": tags}) for source, tags in cells]
        )
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        return tmp_path

    return write


def test_unknown_mechanism_is_named():
    """A name without a notebook is refused, and the six are listed."""
    with pytest.raises(
        ValueError, match=f"no notebook 'telepathy': expected one of {', '.join(MECHANISMS)}"
    ):
        load_mechanism("telepathy")


def test_notebook_without_tagged_cells_is_refused(write):
    """A notebook that does not tag its mechanism has none."""
    folder = write("seventh", ("def wrap(model, tokenizer): return model", []))
    with pytest.raises(ValueError, match="seventh.ipynb has no cell tagged 'mechanism'"):
        load_mechanism("seventh", folder)


def test_missing_functions_are_named(write):
    """Cells that define some of the five functions are refused, and the others are named."""
    folder = write(
        "eighth",
        ("def wrap(model, tokenizer): return model", ["mechanism"]),
        ("def read(): pass", []),
        ("steer = 1", ["mechanism"]),
    )
    with pytest.raises(
        ValueError, match="eighth.ipynb do not define read, steer, logits, generate"
    ):
        load_mechanism("eighth", folder)


def test_only_tagged_cells_run(write):
    """Other cells are not run; tagged ones run in order, in one namespace, and once."""
    folder = write(
        "ninth",
        ("x = [1]", ["mechanism"]),
        ("raise RuntimeError", []),
        ("x += [2]", ["other", "mechanism"]),
    )
    assert notebook_namespace("ninth", folder)["x"] == [1, 2]
    assert notebook_namespace("ninth", folder) is notebook_namespace("ninth", folder)


@pytest.mark.parametrize("name", MECHANISMS)
def test_nothing_holds_a_second_copy(name):
    """Only tagged cells define or import the functions, so what runs here is what is read."""
    notebook = nbformat.read(notebook_paths([name])[0], as_version=4)
    tagged, others = mechanism_cells(name), []
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source not in tagged:
            others += _bound_names(cell.source)
    assert not set(others) & {*FUNCTIONS, "intervene"}
    assert set(FUNCTIONS) <= {bound for source in tagged for bound in _bound_names(source)}


def _bound_names(source: str) -> list[str]:
    """Every name that a cell defines, assigns or imports, at any depth."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    names += [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return names + [
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]


@pytest.mark.parametrize("name", MECHANISMS)
def test_no_second_copy_of_the_weights(name, model, tokenizer):
    """`wrap` works on the model's own tensors; at most a bias is new."""
    wrapped = load_mechanism(name).wrap(copy_sharing_weights(model), tokenizer)
    module = getattr(wrapped, "_module", wrapped)
    own = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    new = [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.untyped_storage().data_ptr() not in own
    ]
    assert all(tensor.ndim == 1 for tensor in new) and len(new) <= 1


# Other architectures: tiny, with random weights.

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def llama(tokenizer) -> nn.Module:
    """A Llama: no layer has a bias, and positions are rotary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=len(tokenizer))).eval()


@pytest.fixture(scope="module")
def gpt_neox(tokenizer) -> nn.Module:
    """A GPT-NeoX: attention and MLP run side by side."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, vocab_size=len(tokenizer))).eval()


@pytest.fixture
def small(request) -> nn.Module:
    return request.getfixturevalue(request.param)


def steered_by(name: str, model: nn.Module, tokenizer, layer: int, vector: torch.Tensor) -> tuple:
    """Return steered resid_post, logits and greedy ids of a padded batch; the model is restored."""
    mechanism, inputs = (
        load_mechanism(name),
        tokenizer(list(PROMPTS), return_tensors="pt", padding=True),
    )
    wrapped = mechanism.wrap(copy_sharing_weights(model), tokenizer)
    before, real = snapshot(wrapped), inputs["attention_mask"].bool()
    with mechanism.steer(wrapped, layer, vector):
        states, scores = (
            mechanism.read(wrapped, inputs, layer)[real],
            mechanism.logits(wrapped, inputs)[real],
        )
        ids = mechanism.generate(
            wrapped, inputs, max_new_tokens=5, pad_token_id=tokenizer.pad_token_id
        )
    assert_pristine(wrapped, before)
    return states, scores, ids


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("small", ["llama", "gpt_neox"], indirect=True)
@pytest.mark.parametrize("name", ["custom_wrapper", "baukit"])
def test_other_architectures(name, small, tokenizer, layer):
    """Wrapper and Trace steer any architecture as the plain hook does, to the last bit."""
    vector = torch.linspace(-1, 1, 32)
    for mine, theirs in zip(
        *(steered_by(each, small, tokenizer, layer, vector) for each in (name, "pytorch_hooks")),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def gpt_j(tokenizer) -> nn.Module:
    """A GPT-J: in transformers 5 too, its blocks return tuples."""
    torch.manual_seed(0)
    sizes = {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "initializer_range": 0.2,
    }
    return AutoModelForCausalLM.from_config(GPTJConfig(**sizes, vocab_size=len(tokenizer))).eval()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", MECHANISMS)
def test_blocks_that_return_tuples(name, gpt_j, tokenizer, batch, layer):
    """Hidden states in a tuple are read and steered, and its rest stays; a bias refuses GPT-J."""
    mechanism, vector, real = (
        load_mechanism(name),
        torch.linspace(-1, 1, 32),
        batch["attention_mask"].bool(),
    )
    seen, handle = _outputs(get_block(gpt_j, layer))
    with torch.no_grad():
        gpt_j(**with_position_ids(batch))
    handle.remove()
    assert isinstance(seen[0], tuple) and len(seen[0]) > 1, "these blocks return no tuple"
    unsteered = seen[0][0][real]
    own = copy_sharing_weights(gpt_j)
    torch.testing.assert_close(
        mechanism.read(mechanism.wrap(own, tokenizer), batch, layer)[real],
        unsteered,
        rtol=0,
        atol=1e-5,
    )
    if name == "bias_editing":
        with (
            pytest.raises(ValueError, match="model type 'gptj'"),
            mechanism.steer(own, layer, vector),
        ):
            raise AssertionError("steered all the same")
        return
    states, scores, ids = steered_by(name, gpt_j, tokenizer, layer, vector)
    _, their_scores, their_ids = steered_by("pytorch_hooks", gpt_j, tokenizer, layer, vector)
    torch.testing.assert_close(states, unsteered + vector, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, their_scores, rtol=0, atol=1e-4)
    assert torch.equal(ids, their_ids)


def _outputs(module: nn.Module) -> tuple[list, RemovableHandle]:
    """A list that gets what the module returns, and the handle that ends it."""
    seen = []
    return seen, module.register_forward_hook(lambda module, args, output: seen.append(output))


# What every mechanism keeps to.


def test_reading_keeps_no_graph(bench, batch):
    """What is read, and the logits, belong to no graph, although the weights can be trained."""
    mechanism, wrapped = bench
    assert any(tensor.requires_grad for tensor in getattr(wrapped, "_module", wrapped).parameters())
    with torch.enable_grad():
        for found in (mechanism.read(wrapped, batch, 2), mechanism.logits(wrapped, batch)):
            assert not found.requires_grad and found.grad_fn is None
        assert torch.is_grad_enabled()


def test_a_vector_in_another_dtype(bench, model, tokenizer, batch, plus):
    """fp32 and fp64 vectors steer a bf16 model as the vector in bf16 does, and bf16 comes out."""
    mechanism = bench.mechanism
    wrapped = mechanism.wrap(copy.deepcopy(model).to(torch.bfloat16), tokenizer)
    found = []
    for vector in (plus.bfloat16(), plus, plus.double()):
        with mechanism.steer(wrapped, 2, vector):
            states, scores = mechanism.read(wrapped, batch, 2), mechanism.logits(wrapped, batch)
            ids = mechanism.generate(wrapped, batch, max_new_tokens=3)
        assert states.dtype == scores.dtype == torch.bfloat16
        found.append((states, scores, ids))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    assert not torch.equal(found[0][1], mechanism.logits(wrapped, batch))


def _of_the_tokenizer(tokenizer) -> tuple:
    """All that a tokenizer is set to, and what it makes of a text."""
    settings = {
        key: value
        for key, value in vars(tokenizer).items()
        if isinstance(value, str | int | bool | list | dict | None)
    }
    return (
        copy.deepcopy(settings),
        tokenizer.special_tokens_map,
        dict(tokenizer("I think")),
        len(tokenizer),
    )


@pytest.mark.parametrize(
    "complete", [True, False], ids=["left", "right, BOS added, no padding token"]
)
@pytest.mark.parametrize("name", MECHANISMS)
def test_what_the_caller_hands_over_stays(name, model, tokenizer, batch, plus, complete):
    """Steering changes neither modules nor hooks, config or tokenizer of the caller."""
    mechanism, own, its_tokenizer = (
        load_mechanism(name),
        copy_sharing_weights(model),
        copy.deepcopy(tokenizer),
    )
    if not complete:
        its_tokenizer.padding_side, its_tokenizer.add_bos_token, its_tokenizer.pad_token = (
            "right",
            True,
            None,
        )
    before, settings, scores = snapshot(own), _of_the_tokenizer(its_tokenizer), logits(own, batch)
    configs = copy.deepcopy((own.config.to_dict(), own.generation_config.to_dict()))
    wrapped = mechanism.wrap(own, its_tokenizer)
    mechanism.read(wrapped, batch, 1)
    with mechanism.steer(wrapped, 1, plus):
        mechanism.logits(wrapped, batch)
        mechanism.generate(wrapped, batch, max_new_tokens=2)
        if wrapped is not own:  # a copy of the modules: the caller's own are not even steered
            assert_pristine(own, before)
            assert torch.equal(logits(own, batch), scores)
    assert_pristine(own, before)
    assert torch.equal(logits(own, batch), scores)
    assert _of_the_tokenizer(its_tokenizer) == settings
    assert (own.config.to_dict(), own.generation_config.to_dict()) == configs


# The wrapper stands in the place of the block.


@pytest.mark.parametrize("training", [True, False])
def test_wrapper_has_the_mode_of_its_block(model, plus, training):
    """It reports the block's mode, hands on `train` and `eval`, and keeps the parts' own modes."""
    own = copy_sharing_weights(model).train(training)
    block = get_block(own, 1)
    block.ln_1.train(not training)  # a part that somebody froze, or did not
    before = snapshot(own)
    with load_mechanism("custom_wrapper").steer(own, 1, plus):
        wrapper = get_block(own, 1)
        assert wrapper is not block and wrapper.training is training
        assert block.ln_1.training is not training
    assert_pristine(own, before)
    with load_mechanism("custom_wrapper").steer(own, 1, plus):
        wrapper = get_block(own, 1)
        for mode in (True, False):
            own.train(mode)
            assert {wrapper.training, *(part.training for part in block.modules())} == {mode}
    assert not block.training  # what was set inside holds afterwards


def test_wrapper_hands_on_attributes(model, plus):
    """The wrapper has every attribute of the block; its own come first; others are errors."""
    own = copy_sharing_weights(model)
    block = get_block(own, 1)
    block.attention_type = "full"
    with load_mechanism("custom_wrapper").steer(own, 1, plus):
        wrapper = get_block(own, 1)
        names = {*vars(block), *dict(block.named_children()), *vars(type(block))} - {
            *dir(nn.Module()),
            *vars(wrapper),
        }
        assert {"attention_type", "ln_1", "mlp"} <= names
        for name in names:
            assert getattr(wrapper, name) == getattr(block, name)
        assert wrapper.block is block and not hasattr(wrapper, "telepathy")
        with pytest.raises(AttributeError, match="telepathy"):
            wrapper.telepathy


def test_cells_run_once(bias_editing):
    """Cells run again would make another module, and nothing of the first could be pickled."""
    assert load_mechanism("bias_editing").steer is bias_editing["steer"]
    assert sys.modules["notebook_bias_editing"].steer is bias_editing["steer"]


# Bias editing: what it gives, takes away, and refuses.


@pytest.fixture(scope="module")
def bias_editing() -> dict:
    return notebook_namespace("bias_editing")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_bias_is_given_to_a_layer_without_one(llama, tokenizer, bias_editing, layer):
    """A Llama's layer gets a bias, steers as the hook does, and has none afterwards."""
    linear, vector = get_block(llama, layer).mlp.down_proj, torch.linspace(-1, 1, 32)
    with bias_editing["steer"](llama, layer, vector):
        assert torch.equal(linear.bias, vector)
    assert linear.bias is None
    for mine, theirs in zip(
        *(
            steered_by(each, llama, tokenizer, layer, vector)
            for each in ("bias_editing", "pytorch_hooks")
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [(3, 1), (1, 2), (2,)])
def test_bias_refuses_what_it_cannot_do(model, bias_editing, rows):
    """A vector for each row or position is refused, and nothing changes; it has no `intervene`."""
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match="expected a steering vector of shape"),
        bias_editing["steer"](model, 1, torch.ones(*rows, model.config.hidden_size)),
    ):
        raise AssertionError("steered all the same")
    assert_pristine(model, before)
    assert load_mechanism("bias_editing").intervene is None


@pytest.mark.parametrize("name", MECHANISMS)
def test_steer_has_one_signature(name):
    """What is wrapped, the layer, the vector: whatever the mechanism calls the first."""
    parameters = list(inspect.signature(load_mechanism(name).steer).parameters)
    assert len(parameters) == 3 and parameters[1:] == ["layer", "vector"]


def test_bias_refuses_unknown_architectures(llama, bias_editing):
    """Nothing is edited where the layer that writes to the stream, or `ln_1`, is unknown."""
    vector = torch.ones(32)
    opt = OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=9,
            word_embed_proj_dim=32,
        )
    )
    with (
        pytest.raises(ValueError, match="model type 'opt': expected one of gpt2, "),
        bias_editing["steer"](opt, 1, vector),
    ):
        raise AssertionError("steered all the same")
    with (
        pytest.raises(ValueError, match="model type 'llama': expected 'gpt2'"),
        bias_editing["steer_ln_1"](llama, 1, vector),
    ):
        raise AssertionError("steered all the same")


def test_a_frozen_bias_is_frozen_while_it_steers(gpt_neox, bias_editing):
    """Gradient descent may change what it could change before."""
    own = copy.deepcopy(gpt_neox).requires_grad_(False)
    with bias_editing["steer"](own, 1, torch.ones(32)):
        assert not _trained(own)


def test_bias_of_a_gpt_neox(gpt_neox, tokenizer, bias_editing):
    """Only the bias of `mlp.dense_4h_to_h` changes; it steers as the hook and is put back."""
    vector, linear = torch.linspace(-1, 1, 32), get_block(gpt_neox, 1).mlp.dense_4h_to_h
    before, bias = snapshot(gpt_neox), linear.bias
    with bias_editing["steer"](gpt_neox, 1, vector):
        assert torch.equal(linear.bias, bias + vector)
        assert differences(gpt_neox, before) == [
            "parameter gpt_neox.layers.1.mlp.dense_4h_to_h.bias changed"
        ]
    assert linear.bias is bias
    for mine, theirs in zip(
        *(
            steered_by(each, gpt_neox, tokenizer, 1, vector)
            for each in ("bias_editing", "pytorch_hooks")
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def _dynamically_quantised(model: nn.Module, layer: int) -> None:
    """Make the layer's `down_proj` an int8 one of torch, whose weight and bias are methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this to torchao
        mlp = get_block(model, layer).mlp
        mlp.down_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(
            _with_qconfig(mlp.down_proj)
        )


def _with_qconfig(linear: nn.Linear) -> nn.Linear:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


def _int8(model: nn.Module, layer: int) -> None:
    """Make the layer's `down_proj` a Linear whose weight is int8, as bitsandbytes does."""
    weight = get_block(model, layer).mlp.down_proj.weight.detach()
    scaled = (weight / weight.abs().max() * 127).round().to(torch.int8)
    get_block(model, layer).mlp.down_proj.weight = nn.Parameter(scaled, requires_grad=False)


def _offloaded(model: nn.Module, layer: int) -> None:
    """Let accelerate keep the block's weights elsewhere until it runs."""
    cpu_offload(get_block(model, layer), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("elsewhere", [_dynamically_quantised, _int8, _offloaded])
def test_bias_refuses_quantised_and_offloaded_layers(llama, bias_editing, elsewhere):
    """A layer without a plain weight keeps its bias; the layers beside it can be steered."""
    own, vector = copy.deepcopy(llama), torch.linspace(-1, 1, 32)
    elsewhere(own, 1)
    before, config = snapshot_without_meta(own), own.config.to_dict()
    with (
        pytest.raises(ValueError, match="Linear of layer 1 is quantised or offloaded"),
        bias_editing["steer"](own, 1, vector),
    ):
        raise AssertionError("steered all the same")
    assert (snapshot_without_meta(own), own.config.to_dict()) == (before, config)
    with bias_editing["steer"](own, 2, vector):
        assert torch.equal(get_block(own, 2).mlp.down_proj.bias, vector)
    assert (snapshot_without_meta(own), own.config.to_dict()) == (before, config)


def snapshot_without_meta(model: nn.Module) -> dict:
    """Identity and shape of every parameter: meta tensors have no numbers to hash."""
    return {
        name: (id(tensor), tensor.shape, tensor.device) for name, tensor in model.named_parameters()
    }


def test_edit_at_ln_1_equals_a_hook_there(model, batch, layer, vector, bias_editing):
    """Editing `c_attn`'s bias gives the logits of a hook on `ln_1`, and is undone."""
    own, logits, real = (
        copy_sharing_weights(model),
        bias_editing["logits"],
        batch["attention_mask"].bool(),
    )
    before = snapshot(own)
    with bias_editing["steer_ln_1"](own, layer, vector):
        edited = logits(own, batch)[real]
    assert_pristine(own, before)
    handle = get_block(own, layer).ln_1.register_forward_hook(
        lambda module, args, output: output + vector
    )
    torch.testing.assert_close(edited, logits(own, batch)[real], rtol=0, atol=1e-4)
    handle.remove()
    read = bias_editing["read_ln_1"](own, batch, layer)
    torch.testing.assert_close(
        read[real],
        get_block(own, layer).ln_1(_resid_pre(own, batch, layer))[real],
        rtol=0,
        atol=1e-5,
    )


def _resid_pre(model: nn.Module, inputs, layer: int) -> torch.Tensor:
    hooks = load_mechanism("pytorch_hooks")
    if layer:
        return hooks.read(model, inputs, layer - 1)
    seen = []
    handle = get_block(model, 0).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    hooks.logits(model, inputs)
    handle.remove()
    return seen[0]


def test_saved_model_is_steered_without_code(model, tokenizer, batch, plus, bias_editing, tmp_path):
    """Saved while steered and loaded again, the model stays steered; the one here is restored."""
    with bias_editing["steer"](model, 2, plus):
        model.save_pretrained(tmp_path)
        steered = bias_editing["logits"](model, batch)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(bias_editing["logits"](loaded, batch), steered)
    assert not torch.allclose(bias_editing["logits"](model, batch), steered)


def _saved_and_loaded(model: nn.Module, inputs, folder: Path) -> torch.Tensor:
    """Save and load a model, with nothing left over or missing, and return its logits."""
    model.save_pretrained(folder)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return load_mechanism("pytorch_hooks").logits(loaded.eval(), inputs)


@pytest.mark.parametrize("layers", [[1], [0, 2], [1, 1]], ids=str)
def test_saved_llama_is_steered_without_code(llama, batch, bias_editing, tmp_path, layers):
    """A Llama is saved with its new biases, two vectors too, and has none afterwards."""
    before = snapshot(llama)
    unsteered, trained = bias_editing["logits"](llama, batch), [name for name, _ in _trained(llama)]
    with ExitStack() as steering:
        for layer in layers:
            steering.enter_context(bias_editing["steer"](llama, layer, torch.linspace(-1, 1, 32)))
        steered = bias_editing["logits"](llama, batch)
        assert not torch.allclose(steered, unsteered)
        assert torch.equal(_saved_and_loaded(llama, batch, tmp_path / "steered"), steered)
        # the zeros that the config asks for are nothing that gradient descent could find
        added, steered = (
            {name for name, _ in _trained(llama)} - {*trained},
            [f"model.layers.{layer}.mlp.down_proj.bias" for layer in layers],
        )
        assert steered[0] in added and added <= {*steered}
    assert_pristine(llama, before)
    assert llama.config.mlp_bias is False
    assert torch.equal(_saved_and_loaded(llama, batch, tmp_path / "after"), unsteered)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]


@pytest.mark.parametrize("config_class", [MistralConfig, Qwen2Config, Qwen3Config])
def test_saving_is_refused_where_the_bias_would_be_lost(
    config_class, tokenizer, batch, bias_editing, tmp_path
):
    """Such a model, its parts and copies refuse to be saved while steered, and save afterwards."""
    torch.manual_seed(0)
    heads = (
        {"num_key_value_heads": 2, "head_dim": 8}
        if config_class is not Qwen2Config
        else {"num_key_value_heads": 2}
    )
    model = AutoModelForCausalLM.from_config(
        config_class(**TINY, **heads, vocab_size=len(tokenizer))
    ).eval()
    vector, unsteered, before = (
        torch.linspace(-1, 1, 32),
        bias_editing["logits"](model, batch),
        snapshot(model),
    )
    with bias_editing["steer"](model, 1, vector), bias_editing["steer"](model, 2, vector):
        for whole in (model, model.model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(
                ValueError, match=f"a saved {model.config.model_type} loses this bias"
            ):
                whole.save_pretrained(tmp_path / "steered")
    assert not (tmp_path / "steered").exists()
    assert_pristine(model, before)
    assert not [part for part in model.modules() if "save_pretrained" in vars(part)]
    assert torch.equal(_saved_and_loaded(model, batch, tmp_path / "after"), unsteered)
    for mine, theirs in zip(
        *(
            steered_by(each, model, tokenizer, 1, vector)
            for each in ("bias_editing", "pytorch_hooks")
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


# The table of agreement.


def test_six_mechanisms_agree(loaded):
    """All six agree with the reference, as `make run` prints."""
    results = [
        love_hate.run_mechanism(name, *loaded[:2], *loaded.preset[:2], max_new_tokens=5)
        for name in MECHANISMS
    ]
    rows = love_hate.agreement(results)
    assert rows["mechanism"].tolist() == list(MECHANISMS)
    assert (rows[["vector", "logits"]] <= love_hate.TOLERANCE).all(axis=None) and rows[
        ["same text", "restored"]
    ].all(axis=None)
    for result in results:
        assert all(len(texts) == len(love_hate.PROMPTS) for texts in result.texts.values())
        assert len({repr(texts) for texts in result.texts.values()}) == 3


def test_what_differs_is_rounding(loaded):
    """In float64 all six agree within 1e-12, so in float32 they differ by rounding alone."""
    model = copy.deepcopy(loaded[0]).double()
    results = [
        love_hate.run_mechanism(name, model, loaded[1], *loaded.preset[:2], max_new_tokens=1)
        for name in MECHANISMS
    ]
    assert all(result.logits["+"].dtype == torch.float64 for result in results)
    assert (love_hate.agreement(results)[["vector", "logits"]] <= 1e-12).all(axis=None)


def test_agreement_flags_a_mechanism_that_steers_one_row(loaded, monkeypatch):
    """Steering only row 0, or leaving a hook, is flagged, and `make run` ends with 1."""
    hooks = load_mechanism("pytorch_hooks")

    @contextmanager
    def steer_row_0(model, layer, vector):
        def add_to_row_0(module, args, output):
            hidden = get_hidden(output).clone()
            hidden[0] += vector
            return with_hidden(output, hidden)

        get_block(model, layer).register_forward_hook(add_to_row_0)
        yield model

    broken = hooks._replace(name="broken", steer=steer_row_0)
    monkeypatch.setattr(
        love_hate,
        "load_mechanism",
        lambda name: broken if name == "broken" else load_mechanism(name),
    )
    monkeypatch.setattr(love_hate, "MECHANISMS", ("pytorch_hooks", "broken"))
    arguments = (*loaded[:2], *loaded.preset[:2])
    rows = love_hate.agreement(
        [love_hate.run_mechanism(name, *arguments) for name in ("pytorch_hooks", "broken")]
    )
    good, bad = rows.itertuples(index=False)
    assert good[1:] == (0.0, 0.0, True, True)
    assert bad.vector == 0 and bad.logits > love_hate.TOLERANCE and bad.restored is False
    assert love_hate.main(["--model", "embedded"]) == 1


def test_agreement_needs_its_reference():
    """Without the reference among the results there is nothing to compare with."""
    with pytest.raises(
        ValueError, match="expected the reference 'pytorch_hooks' among the results, got none"
    ):
        love_hate.agreement([])


def test_run_refuses_a_model_it_cannot_load(capsys):
    """`make run` with a model that cannot be had: one sentence on stderr, exit code 1."""
    assert love_hate.main(["--model", "./missing"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("there is no folder ./missing") and len(err.splitlines()) == 1


def test_cell_errors_point_into_the_notebook():
    """A traceback through a cell names the notebook and shows the line."""
    with pytest.raises(ZeroDivisionError) as caught:
        run_cells(["x = 1\n", "y = 1\nx / 0\n"], "tenth")
    entry = caught.traceback[-1]
    assert "<tenth.ipynb, mechanism cell 2," in str(entry.path) and entry.lineno == 1
