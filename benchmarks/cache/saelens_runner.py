"""Run by the peers' Python: SAELens' `CacheActivationsRunner` on rows that are packed already.

`benchmarks.cache.forward` starts it; it prints the CPU seconds of `run`. It knows nothing of saemill. The
model is transformers' own, by SAELens' class for these, or TransformerLens' `HookedTransformer`, SAELens'
default; this is built of the same weights here, as SAELens would fetch one by an official name.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neox_weights


def hooked(model: str, dtype: torch.dtype) -> HookedTransformer:
    """Build TransformerLens' model of a GPT-NeoX checkpoint."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config: Any = theirs.config
    d_head = config.hidden_size // config.num_attention_heads
    own = HookedTransformerConfig(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size, n_ctx=config.max_position_embeddings,
        d_head=d_head, n_heads=config.num_attention_heads,
        d_mlp=config.intermediate_size, d_vocab=config.vocab_size, act_fn="gelu", eps=config.layer_norm_eps,
        use_attn_scale=True, positional_embedding_type="rotary", normalization_type="LN", dtype=dtype,
        parallel_attn_mlp=config.use_parallel_residual, rotary_adjacent_pairs=False, device="cpu",
        rotary_dim=int(config.rope_parameters["partial_rotary_factor"] * d_head), default_prepend_bos=False,
    )  # fmt: skip
    made = HookedTransformer(own, transformers.AutoTokenizer.from_pretrained(model))
    made.load_state_dict(convert_neox_weights(theirs, own), strict=False)
    return made


def main() -> None:
    folder, model, block, batch_rows = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    dtype, by_hooked = getattr(torch, sys.argv[5]), sys.argv[6] == "HookedTransformer"
    ids_RS = np.load(folder / "ids.npy")
    config = transformers.AutoConfig.from_pretrained(model)
    prefix = transformers.AutoModelForCausalLM.from_config(config).base_model_prefix
    hook = f"blocks.{block.rpartition('.')[2]}.hook_resid_post" if by_hooked else f"{prefix}.{block}"
    if by_hooked:
        made = hooked(model, dtype)
        cache_activations_runner.load_model = lambda **_: made  # type: ignore[assignment]
    n_rows = len(ids_RS) // batch_rows * batch_rows
    runner = CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            dataset_path="rows", model_name=model, model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": dtype}, model_batch_size=batch_rows, hook_name=hook,
            d_in=config.hidden_size, training_tokens=n_rows * ids_RS.shape[1], context_size=ids_RS.shape[1],
            new_cached_activations_path=str(folder / "acts"), shuffle=False, device="cpu", streaming=False,
            prepend_bos=False, buffer_size_gb=0.1,
        ),
        override_dataset=Dataset.from_dict({"input_ids": ids_RS.tolist()}),
    )  # fmt: skip
    torch.set_num_threads(1)
    start = time.process_time()
    cached = runner.run()
    seconds = time.process_time() - start
    first = torch.tensor(cached[0][hook])
    truth = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        states = truth(torch.from_numpy(ids_RS[:1]), output_hidden_states=True).hidden_states
    wanted = states[int(block.rpartition(".")[2]) + 1][0]
    print(float((first - wanted).norm() / wanted.norm()), len(cached))
    print(seconds * len(ids_RS) / len(cached))


if __name__ == "__main__":
    main()
