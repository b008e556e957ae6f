"""Tiny models with random weights of ten architectures, for what must work on all of them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RecurrentGemmaConfig,
    RwkvConfig,
)

LAYERS, D_MODEL = 4, 32
SIZES = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES = {
    "GPT-2": (GPT2Config, {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "GPT-NeoX": (GPTNeoXConfig, {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}),
    "Llama": (LlamaConfig, WIDE),
    "Mistral": (MistralConfig, WIDE),
    "Gemma": (GemmaConfig, {**WIDE, "head_dim": 8}),
    "Qwen3": (Qwen3Config, {**WIDE, "head_dim": 8}),
    "Phi": (PhiConfig, WIDE),
    "OPT": (OPTConfig, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL, "max_position_embeddings": 64}),
    "BLOOM": (BloomConfig, {"hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": 4}),
    "Falcon": (FalconConfig, {**SIZES, "new_decoder_architecture": False, "alibi": False}),
}
# Models that remember by a state: they hand over no keys and values, or (RecurrentGemma) some, and do not return them.
RECURRENT = {
    "Mamba": (MambaConfig, {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "state_size": 4}),
    "Mamba-2": (Mamba2Config, {**SIZES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "RWKV": (RwkvConfig, {**SIZES, "attention_hidden_size": D_MODEL, "context_length": 64, "rescale_every": 0}),
    "RecurrentGemma": (RecurrentGemmaConfig, {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1, "lru_width": D_MODEL}),
}
# The parts that a block of these architectures lacks: Phi and Falcon run attention and MLP side by side behind one norm; OPT
# has no module around its MLP, and flattens batch and position in front of its second norm.
MISSING = {
    "Phi": {"post_attention_layernorm"}, "Falcon": {"post_attention_layernorm"}, "OPT": {"mlp", "post_attention_layernorm"},
}


def tiny_config(name: str, vocab_size: int) -> PretrainedConfig:
    """The config of a tiny model; token 0 ends a text."""
    config_class, sizes = (ARCHITECTURES | RECURRENT)[name]
    return config_class(**sizes, vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def tiny_model(name: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A tiny model in evaluation mode, with weights large enough that greedy texts do not stand still."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, vocab_size)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    model.generation_config.pad_token_id = 0
    return model
