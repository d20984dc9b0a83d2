"""Qwen2 models of transformers in the shape of a size, with its own initialisation."""

import torch
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from bench.peers.common import EOS, PAD
from bench.sizes import Size


def policy_model(size: Size, seed: int) -> Qwen2ForCausalLM:
    """A policy, float32."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(_config(size)).float()


def value_model(size: Size, seed: int) -> Qwen2ForSequenceClassification:
    """A critic with its own trunk, float32."""
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(_config(size, num_labels=1)).float()


def sampling(tokens: int) -> GenerationConfig:
    """Settings of `generate` for responses of just so many tokens; the model must have no EOS."""
    return GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0,
        top_k=0, top_p=1.0, pad_token_id=PAD, use_cache=True,
    )  # fmt: skip


def _config(size: Size, **others) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.mlp,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_dim, max_position_embeddings=2048,
        rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=size.tied, attention_dropout=0.0,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, use_cache=True, **others,
    )  # fmt: skip
