"""Tiny models with random weights, one per family of transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from saemill.common.models.model import LanguageModel

N_LAYERS = 3
SIZE = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
COMMON = SIZE | {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = COMMON | {"num_key_value_heads": 1}
SHIFTED = COMMON | {"pad_token_id": 1, "bos_token_id": 0}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 40}
VISION = {
    "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
LLAVA = {
    "text_config": SIZE | {"model_type": "llama"},
    "vision_config": VISION | {"model_type": "clip_vision_model"},
}
OPT = {
    "vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2, "ffn_dim": 64, "max_position_embeddings": 40,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": N_LAYERS, "num_heads": 2}
BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": N_LAYERS, "decoder_layers": N_LAYERS,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
}  # fmt: skip
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
GRANITE = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 64, "head_dim": 16, "num_local_experts": 2, "attention_chunk_size": 16}

CAUSAL: dict[str, Any] = {
    "gpt_neox": lambda: tf.GPTNeoXConfig(**COMMON),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gptj": lambda: tf.GPTJConfig(**GPT2, rotary_dim=8),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "llama4_text": lambda: tf.Llama4TextConfig(**GROUPED, **LLAMA4),
    "mistral": lambda: tf.MistralConfig(**GROUPED, head_dim=16),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, head_dim=16),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=16),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
    "bloom": lambda: tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=N_LAYERS, n_head=2),
    "falcon": lambda: tf.FalconConfig(**{key: SIZE[key] for key in SIZE if key != "intermediate_size"}),
    "opt": lambda: tf.OPTConfig(**OPT),
    "mpt": lambda: tf.MptConfig(d_model=32, n_heads=2, n_layers=N_LAYERS, max_seq_len=40, vocab_size=99),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=2),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**GROUPED, head_dim=16, **MOE),
    "gpt_oss": lambda: tf.GptOssConfig(**GROUPED, **GPT_OSS),
    "granite": lambda: tf.GraniteConfig(**GROUPED, **GRANITE),
    "granitemoeshared": lambda: tf.GraniteMoeSharedConfig(
        **GROUPED, **GRANITE, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**COMMON, num_key_value_heads=2, **DEEPSEEK),
    "mamba": lambda: tf.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=N_LAYERS, state_size=4),
    "rwkv": lambda: tf.RwkvConfig(vocab_size=99, context_length=40, hidden_size=32, num_hidden_layers=3),
    "llava": lambda: tf.LlavaConfig(**LLAVA, image_token_index=60),
}  # fmt: skip
MASKED: dict[str, Any] = {
    "bert": lambda: tf.BertConfig(**COMMON),
    "roberta": lambda: tf.RobertaConfig(**SHIFTED),
    "xlm-roberta": lambda: tf.XLMRobertaConfig(**SHIFTED),
    "camembert": lambda: tf.CamembertConfig(**SHIFTED),
    "mpnet": lambda: tf.MPNetConfig(**SHIFTED),
    "esm": lambda: tf.EsmConfig(**SHIFTED, position_embedding_type="absolute", mask_token_id=3),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=N_LAYERS, n_heads=2, hidden_dim=64, max_position_embeddings=40
    ),
    "modernbert": lambda: tf.ModernBertConfig(**COMMON, cls_token_id=1, sep_token_id=2),
    "deberta-v2": lambda: tf.DebertaV2Config(**COMMON),
    "electra": lambda: tf.ElectraConfig(**COMMON, embedding_size=16),
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "albert": lambda: tf.AlbertConfig(**COMMON, embedding_size=16),
    "t5": lambda: tf.T5Config(**T5, decoder_start_token_id=0),
    "bart": lambda: tf.BartConfig(**BART),
    "xlnet": lambda: tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=N_LAYERS, n_head=2, d_inner=64),
    "whisper": lambda: tf.WhisperConfig(**BART | {"vocab_size": 51865}),
    "clip": lambda: tf.CLIPConfig(text_config=SIZE, vision_config=VISION),
    "vit": lambda: tf.ViTConfig(**VISION),
    "longformer": lambda: tf.LongformerConfig(**SHIFTED, attention_window=8),
}  # fmt: skip

BLOCKS = {
    **dict.fromkeys(CAUSAL, "layers"), **dict.fromkeys(("gpt2", "gptj", "bloom", "falcon"), "h"),
    **dict.fromkeys(("mpt", "rwkv"), "blocks"), "opt": "decoder.layers", "llava": "language_model.layers",
    **dict.fromkeys(MASKED, "encoder.layer"), "distilbert": "transformer.layer", "modernbert": "layers",
    "t5": "encoder.block", "bart": "encoder.layers",
}  # fmt: skip
"""Path of the blocks, below the base model."""
BERT = {
    "attention": "attention.output.dense", "attention.output": "attention.output.dense",
    "output": "output.dense",
}  # fmt: skip
HOLDING = {
    "bloom": {"self_attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"},
    "mpt": {"ffn": "ffn.down_proj"},
    **dict.fromkeys(("esm", "bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), BERT),
    "mpnet": {"attention": "attention.attn", "output": "output.dense"},
}
"""Modules of a block that return the residual stream, and what adds to it, read in transformers' code."""
SANDWICH = {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
NORMED = dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), SANDWICH)
"""Modules whose output is normed before it is added, and the norms, read in transformers' code."""
LLAMA = ("self_attn", "mlp")
ADDED = {
    "gpt_neox": ("attention", "mlp"), "gpt2": ("attn", "mlp"), "gptj": ("attn", "mlp"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"), LLAMA),
    **dict.fromkeys(("gpt_oss", "granite", "deepseek_v3", "llava"), LLAMA),
    **dict.fromkeys(NORMED, tuple(SANDWICH.values())),
    "granitemoeshared": ("self_attn", "block_sparse_moe", "shared_mlp"),
    "llama4_text": ("self_attn", "feed_forward"), "opt": ("self_attn", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"), "falcon": ("self_attention", "mlp"),
    "mpt": ("attn", "ffn.down_proj"), "mamba": ("mixer",), "rwkv": ("attention", "feed_forward"),
    "modernbert": ("attn", "mlp"), "esm": ("attention.output.dense", "output.dense"),
}  # fmt: skip
"""Modules whose outputs, added to what enters a block, are what leaves it."""
ADDED_BEFORE_NORM = {
    **dict.fromkeys(HOLDING.keys() - {"bloom", "mpt", "esm", "mpnet"}, tuple(dict.fromkeys(BERT.values()))),
    "mpnet": ("attention.attn", "output.dense"), "distilbert": ("attention", "ffn"),
}  # fmt: skip
"""The same of blocks that norm each sum."""
FACTOR = {"granite": 0.22, "granitemoeshared": 0.22}


def make(family: str, folder: str) -> Any:
    """Save a model of random weights, with its LM head where the family has one."""
    torch.manual_seed(0)
    config = (CAUSAL | MASKED | OTHERS)[family]()
    kinds = (
        (family == "llava", tf.AutoModelForImageTextToText),
        (family in CAUSAL, tf.AutoModelForCausalLM),
        (family in MASKED, tf.AutoModelForMaskedLM),
        (True, tf.AutoModel),
    )
    model = next(kind for holds, kind in kinds if holds).from_config(config).eval()
    model.save_pretrained(folder)
    return model


def load(folder: Path, with_head: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a model that `make` saved, as saemill does."""
    cpu = torch.device("cpu")
    return LanguageModel(str(folder), revision=None, dtype=dtype, device=cpu, with_head=with_head)
