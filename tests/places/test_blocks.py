"""Finding a block in any architecture, and the hidden states in whatever it returns."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from common.places.blocks import (
    block_path,
    check_vector,
    get_block,
    get_blocks,
    get_hidden,
    with_hidden,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 20}
CONFIGS: dict[str, PretrainedConfig] = {
    "transformer.h": GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=20),
    "model.layers": LlamaConfig(**SIZES, intermediate_size=16),
    "gpt_neox.layers": GPTNeoXConfig(**SIZES, intermediate_size=16),
    "model.decoder.layers": OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16),
}


def build(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.mark.parametrize("path", CONFIGS)
def test_blocks_are_found(path):
    """Each architecture's blocks have their path, and block `n` is the n-th, by path too."""
    model = build(CONFIGS[path])
    found, blocks = get_blocks(model)
    assert found == path and len(blocks) == 3
    for layer in range(3):
        assert (
            get_block(model, layer)
            is blocks[layer]
            is model.get_submodule(block_path(model, layer))
        )


def test_list_inside_a_block_does_not_count():
    """As many experts as blocks: the blocks are still found."""
    config = MixtralConfig(
        **SIZES, num_local_experts=3, num_key_value_heads=2, intermediate_size=16
    )
    assert get_blocks(build(config))[0] == "model.layers"


def test_no_list_or_two_lists_are_refused():
    """A model in which the blocks cannot be told is refused, and the candidates are named."""
    model = build(CONFIGS["model.layers"])
    model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(
        ValueError,
        match=(
            r"expected one list of 3 blocks in LlamaForCausalLM, found \['model.layers', 'others'\]"
        ),
    ):
        get_blocks(model)
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="found none"):
        get_blocks(model)


@pytest.mark.parametrize("wrong", [-1, 3, True, False, 1.0, "1", None])
def test_wrong_layer_is_refused(wrong):
    """Only an integer from 0 to the last layer names a block."""
    model = build(CONFIGS["model.layers"])
    for function in (get_block, block_path):
        with pytest.raises(ValueError, match="expected an integer from 0 to 2"):
            function(model, wrong)


@pytest.mark.parametrize(
    "rest", [None, (), ("cache", "attention")], ids=["tensor", "tuple of one", "tuple"]
)
def test_output_keeps_its_form(rest):
    """Tensor or tuple, one row or several: the hidden states are replaced, and only they."""
    for rows in (1, 2):
        hidden = torch.arange(rows * 6.0).view(rows, 2, 3)
        output = hidden if rest is None else (hidden, *rest)
        assert get_hidden(output) is hidden
        replaced = with_hidden(output, hidden + 1)
        assert type(replaced) is type(output) and torch.equal(get_hidden(replaced), hidden + 1)
        assert rest is None or replaced[1:] == rest


def test_vector_takes_the_blocks_dtype():
    """A vector in another precision is converted to the block's; the given one stays as it is."""
    model = build(CONFIGS["model.layers"]).bfloat16()
    vector = torch.ones(16, dtype=torch.float64)
    assert check_vector(model, 1, vector).dtype == torch.bfloat16 and vector.dtype == torch.float64


def test_vector_stays_where_it_is_for_an_offloaded_block():
    """Accelerate keeps weights of an offloaded block on the meta device, where nothing adds up."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["model.layers"])
    assert check_vector(model, 1, torch.ones(16)).tolist() == [1.0] * 16


@pytest.mark.parametrize("offload", [False, True])
def test_a_vector_goes_to_where_accelerate_runs_the_block(offload):
    """Not to where the weights wait; "meta" stands for a device that this machine has not."""
    model = build(CONFIGS["model.layers"])
    hook = {"execution_device": torch.device("meta"), "offload": offload}
    add_hook_to_module(get_block(model, 1).mlp, AlignDevicesHook(**hook))
    assert [check_vector(model, layer, torch.ones(16)).device.type for layer in (0, 1)] == [
        "cpu",
        "meta",
    ]


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_a_vector_keeps_its_numbers_beside_quantised_weights(stored):
    """The first weight is quantised, its dtype none for a vector; the norms have the right one."""
    model = build(CONFIGS["model.layers"]).to(torch.bfloat16)
    weight = next(get_block(model, 1).parameters())
    weight.requires_grad_(False)
    weight.data = weight.data.to(stored)
    vector = check_vector(model, 1, torch.full((16,), 0.7))
    assert vector.dtype == torch.bfloat16
    torch.testing.assert_close(vector.float(), torch.full((16,), 0.7), atol=2e-3, rtol=0)
