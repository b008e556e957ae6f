"""Tiny models with random weights: eleven architectures, and some that are unlike them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MptConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    RobertaConfig,
    RwkvConfig,
    WhisperConfig,
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
    "Qwen2": (Qwen2Config, WIDE),
    "Qwen3": (Qwen3Config, {**WIDE, "head_dim": 8}),
    "Phi": (PhiConfig, WIDE),
    "OPT": (
        OPTConfig,
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": D_MODEL, "max_position_embeddings": 64},
    ),
    "BLOOM": (BloomConfig, {"hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": 4}),
    "Falcon": (FalconConfig, {**SIZES, "new_decoder_architecture": False, "alibi": False}),
}
GPT = {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
SMALL = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
DECODER = {
    "d_model": D_MODEL,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
KINDS = ["sliding_attention", "full_attention"] * 2
# Positions that are not counted from the mask, a state in which padding shows, rows that mix, more
# than a stream between blocks, a cache that is not like others, no cache at all.
ODD = {
    "BART decoder": (BartConfig, DECODER),
    "Whisper decoder": (WhisperConfig, {**DECODER, "max_target_positions": 64}),
    "BERT decoder": (BertConfig, {**SMALL, "is_decoder": True}),
    "RoBERTa decoder": (RobertaConfig, {**SMALL, "is_decoder": True, "pad_token_id": 1}),
    "RecurrentGemma": (
        RecurrentGemmaConfig,
        {**WIDE, "head_dim": 8, "lru_width": D_MODEL, "attention_window_size": 64},
    ),
    "RWKV": (
        RwkvConfig,
        {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "intermediate_size": 48},
    ),
    "Mamba": (MambaConfig, {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "state_size": 8}),
    "MiniMax": (MiniMaxConfig, {**WIDE, "head_dim": 8, "num_local_experts": 2, "block_size": 4}),
    "MPT": (MptConfig, {"d_model": D_MODEL, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}),
    "GPT-1": (OpenAIGPTConfig, GPT),
    "Gemma 4, shared keys": (
        Gemma4TextConfig,
        {
            **WIDE,
            "num_kv_shared_layers": 2,
            "layer_types": KINDS,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 99,
        },
    ),
}
# Models that remember by a state: they hand over no keys and values, or (RecurrentGemma) some, and
# do not return them.
RECURRENT = {
    **{name: ODD[name] for name in ("Mamba", "RWKV", "RecurrentGemma")},
    "Mamba-2": (
        Mamba2Config,
        {**SIZES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
}
# The parts that a block of these architectures lacks: Phi and Falcon run attention and MLP side by
# side behind one norm; OPT has no module around its MLP, and flattens batch and position in front
# of its second norm.
MISSING = {
    "Phi": {"post_attention_layernorm"},
    "Falcon": {"post_attention_layernorm"},
    "OPT": {"mlp", "post_attention_layernorm"},
}


def tiny_config(name: str, vocab_size: int) -> PretrainedConfig:
    """The config of a tiny model; token 0 ends a text."""
    config_class, sizes = (ARCHITECTURES | ODD | RECURRENT)[name]
    if "vocab_size_per_layer_input" in sizes:
        sizes = {**sizes, "vocab_size_per_layer_input": vocab_size}
    return config_class(
        **{
            "vocab_size": vocab_size,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **sizes,
        }
    )


def tiny_model(name: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A tiny model in evaluation mode, with weights so large that greedy texts keep moving."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, vocab_size)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    model.generation_config.pad_token_id = 0
    return model
