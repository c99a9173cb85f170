"""Run by the peers' Python: what sparsify, SAELens, dictionary_learning, circuit-tracer and TransformerLens
do with files.

`python in_peers.py` reads names of files: lists of jobs, each `{"do": one of JOBS, …}`. It answers each with
a line of JSON: the traceback of what failed, or nothing. It knows nothing of saemill.
"""

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sparsify_sae(folder: Path) -> Any:
    from sparsify import SparseCoder

    return SparseCoder.load_from_disk(folder)


def saelens_sae(folder: Path) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def dictionary_learning_sae(folder: Path) -> Any:
    without_their_data()
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder), "cpu")[0]


def sparsify_from_hub(place: Path) -> Any:
    from sparsify import SparseCoder

    return SparseCoder.load_from_hub(str(place.parent), hookpoint=place.name)


def saelens_from_hub(place: Path) -> Any:
    from sae_lens import SAE

    return SAE.from_pretrained(str(place.parent), place.name)


def without_their_data() -> None:
    """dictionary_learning imports these for its buffers over models, which are not used here."""
    for name, attribute in (("nnsight", "LanguageModel"), ("zstandard", "ZstdDecompressor")):
        sys.modules.setdefault(name, ModuleType(name)).__dict__.setdefault(attribute, object)


LOAD = {
    "sparsify": sparsify_sae,
    "saelens": saelens_sae,
    "dictionary_learning": dictionary_learning_sae,
    "sparsify from the hub": sparsify_from_hub,
    "saelens from the hub": saelens_from_hub,
}


def encode(format: str, folder: str, x: str, out: str) -> None:
    """Latents [T, F] and reconstructions [T, D] of an SAE as the peer loads it, and its config."""
    sae = LOAD[format](Path(folder))
    x_TD = torch.from_numpy(np.load(x))
    with torch.no_grad():
        if format.startswith("sparsify"):
            acts, indices, _ = sae.encode(x_TD)
            latents = torch.zeros(len(x_TD), sae.num_latents).scatter(1, indices, acts)
            reconstruction = sae.decode(acts, indices)
        else:
            latents = sae.encode(x_TD)
            reconstruction = sae.decode(latents)
        if getattr(sae, "W_skip", None) is not None:
            reconstruction = forward(sae, x_TD)  # which alone adds it
        if not getattr(sae.cfg if format.startswith("sparsify") else None, "multi_topk", False):
            assert torch.equal(forward(sae, x_TD), reconstruction)  # multi_topk's forward pass takes 4k
    told = json.dumps(sae.cfg.metadata.to_dict()) if format == "saelens" else ""
    np.savez(out, latents=latents.numpy(), reconstruction=reconstruction.numpy(), told=told)


def load_set(folder: str, x: str, out: str) -> None:
    """Latents [L, T, F] and predictions [L, T, D] of a set of transcoders, as circuit-tracer loads it."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # which later versions have not
    from circuit_tracer.utils.caching import load_transcoders_from_cache

    transcoders, _ = load_transcoders_from_cache(folder)
    x_LTD = torch.from_numpy(np.load(x))
    with torch.no_grad():
        latents = transcoders.encode(x_LTD)
        predictions = transcoders.decode(latents, x_LTD)
    np.savez(out, latents=latents.numpy(), predictions=predictions.numpy())


def forward(sae: Any, x_TD: Tensor) -> Tensor:
    """The peer's own forward pass."""
    output = sae(x_TD)
    return output if isinstance(output, Tensor) else output.sae_out


def randomize(sae: torch.nn.Module, seed: int) -> None:
    """Every weight and bias random, decoders' norms among them."""
    generator = torch.Generator().manual_seed(seed)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 2


def make_sparsify(folder: str, d_in: int, **config: Any) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(**config))
    randomize(sae, 1)
    sae.save_to_disk(folder)


def make_saelens(
    folder: str,
    training: bool = False,
    save: str = "save_model",
    metadata: dict[str, Any] | None = None,
    architecture: str = "topk",
    **config: Any,
) -> None:
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(architecture)
    made = config_class(**config)
    made.metadata = SAEMetadata(**(metadata or {}))
    sae = sae_class(made)
    randomize(sae, 2)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.7)
    getattr(sae, save)(folder)


def make_scaled_saelens(folder: str, folded: str, factor: float, **config: Any) -> None:
    """A checkpoint with the factor beside it, and the SAE that SAELens itself makes of both."""
    from sae_lens import TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    make_saelens(folder, training=True, normalize_activations="expected_average_only_in", **config)
    ActivationScaler(factor).save(str(Path(folder) / "activation_scaler.json"))
    sae = TrainingSAE.load_from_disk(folder)
    sae.fold_activation_norm_scaling_factor(factor)
    sae.save_inference_model(folded)


def make_dictionary_learning(
    folder: str, d_in: int, num_latents: int, trainer: str = "top_k.TopKTrainer", **more: Any
) -> None:
    """What its own training leaves after two steps, with a submodule named as in its demo."""
    without_their_data()
    from dictionary_learning.training import trainSAE

    module, _, name = trainer.rpartition(".")
    config = {
        "trainer": getattr(import_module(f"dictionary_learning.trainers.{module}"), name), "steps": 2,
        "activation_dim": d_in, "dict_size": num_latents,
        "layer": 1, "lm_name": "EleutherAI/pythia-160m", "submodule_name": "resid_post_layer_1",
        "warmup_steps": 0, "device": "cpu", "seed": 0, "lr": 0.1,
    } | more  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    batches = iter([3 * torch.randn(64, d_in, generator=generator) + 1 for _ in range(3)])
    trainSAE(batches, [config], 2, save_dir=folder, device="cpu")


def hooks(model: str, tokenizer: str, ids: str, names: list[str], out: str) -> None:
    """Activations at TransformerLens' hooks of a model on disk."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    tokens = torch.from_numpy(np.load(ids))
    bridge = TransformerBridge.boot_transformers(
        model, device="cpu", tokenizer=transformers.AutoTokenizer.from_pretrained(tokenizer)
    )
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    np.savez(out, **{name: cache[name].numpy() for name in names if name in cache})


def splice(folder: str, ids: str, out: str) -> None:
    """Loss without and with an SAE, in the model and at the hook that its config names."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    sae = saelens_sae(Path(folder))
    model = SAETransformerBridge.boot_transformers(sae.cfg.metadata.model_name, device="cpu")
    tokens = torch.from_numpy(np.load(ids))
    with torch.no_grad():
        bare = model(tokens, return_type="loss")
        spliced = model.run_with_saes(tokens, saes=[sae], return_type="loss")
    np.save(out, torch.stack([bare, spliced]).numpy())


def pretokenize(texts: str, tokenizer: str, ctx_len: int, out: str) -> None:
    """SAELens' own rows of token ids, as its runner saves them."""
    from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig

    config = PretokenizeRunnerConfig(
        tokenizer_name=tokenizer, dataset_path="json", data_files=[texts], column_name="text",
        context_size=ctx_len, save_path=out, num_proc=1, shuffle=True, seed=1,
    )  # fmt: skip
    PretokenizeRunner(config).run()


def chunk_and_tokenize(texts: str, tokenizer: str, ctx_len: int, out: str) -> None:
    """sparsify's own rows of token ids, saved as its users do."""
    import transformers
    from datasets import load_dataset
    from sparsify.data import chunk_and_tokenize as chunk

    data = load_dataset("json", data_files=texts, split="train")
    chunks = chunk(
        data, transformers.AutoTokenizer.from_pretrained(tokenizer), max_seq_len=ctx_len, num_proc=1
    )
    chunks.save_to_disk(out)


JOBS = {
    job.__name__: job
    for job in (
        encode, load_set, make_sparsify, make_saelens, make_scaled_saelens, make_dictionary_learning, hooks,
        splice, pretokenize, chunk_and_tokenize,
    )
}  # fmt: skip


def answer(file: Path) -> str:
    """The traceback of a file's jobs, which run in its folder; empty if all went well."""
    os.chdir(file.parent)
    try:
        for job in json.loads(file.read_text()):
            JOBS[job.pop("do")](**job)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where the peers print
    for line in sys.stdin:
        print(json.dumps(answer(Path(line.rstrip("\n")))), file=answers, flush=True)
