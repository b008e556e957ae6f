"""The six agree at the size of GPT2-XL: its shape with random weights, and the real GPT-2 tokenizer.

`make full-size` runs this; it needs 16 GB of memory and some minutes, so `make test` leaves it out.
"""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerBase

from common import love_hate
from common.mechanisms import MECHANISMS, ROOT
from common.models import preset_for

pytestmark = pytest.mark.full_size

TOKENIZER = ROOT.parent / "shared" / "gpt2_tokenizer"
TOLERANCE = 1e-4  # largest difference of a logit; 48 blocks add up more rounding than the embedded model's few


@pytest.fixture(scope="module")
def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    if not Path(TOKENIZER).is_dir():
        pytest.skip(
            f"the files of the GPT-2 tokenizer are not in {TOKENIZER.relative_to(ROOT.parent)} beside the project"
        )
    tokenizer = GPT2Tokenizer.from_pretrained(TOKENIZER, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def gpt2_xl() -> GPT2LMHeadModel:
    """GPT2-XL from its config, in fp32, with random weights from a seed; made in place, without a second copy."""
    config = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.02, generator=generator)
            else:  # a bias, or the scale of a layer norm
                weight.fill_(float(name.endswith("weight")))
    model.generation_config.pad_token_id = config.eos_token_id
    return model


def test_shape_is_gpt2_xls(gpt2_xl):
    """48 blocks of width 1600 and 1.56 billion parameters."""
    assert len(gpt2_xl.transformer.h) == 48 and gpt2_xl.num_parameters() == 1_557_611_200


def test_contrast_words(gpt2_tokenizer):
    """ "Love" is one token and "Hate" two, so both are read at their last token."""
    assert [len(gpt2_tokenizer(word)["input_ids"]) for word in ("Love", "Hate")] == [1, 2]


def test_six_mechanisms_agree_at_full_size(gpt2_xl, gpt2_tokenizer):
    """At the published layer and coefficient: logits within 1e-4, the same greedy ids, and the model restored."""
    layer, coeff, _ = preset_for("gpt2-xl", 48)
    results = [
        love_hate.run_mechanism(name, gpt2_xl, gpt2_tokenizer, layer, coeff, max_new_tokens=8) for name in MECHANISMS
    ]
    rows = love_hate.agreement(results)
    print(rows.to_string())
    assert (rows[["vector", "logits"]] <= TOLERANCE).all(axis=None)
    assert rows[["same text", "restored"]].all(axis=None)
    logits = results[0].logits
    for sign in ("+", "-"):
        assert (logits[sign] - logits["unsteered"]).abs().max() > 100 * TOLERANCE, "steering did nothing"
