"""Run by the peers' Python: what sparsify, SAELens, dictionary_learning, circuit-tracer, TransformerLens,
delphi, SAEDashboard and SAEBench do with files.

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


def encode_published(
    loader: str,
    repo: str,
    folder: str,
    x: str,
    out: str,
    factor: float | None = None,
    n_heads: int | None = None,
    **overrides: Any,
) -> None:
    """Latents [T, F] and reconstructions [T, D] of a published SAE, as SAELens loads it from its
    repository, of which a copy is in the folder of that name."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        file = Path(repo_id) / subfolder / filename
        if not file.exists():
            raise loaders.EntryNotFoundError.__new__(loaders.EntryNotFoundError)
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(Path(repo_id) / filename, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = download, shapes
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader]
    made = load(repo, folder, "cpu", False, {"dtype": "float32"} | overrides)
    sae: Any = SAE.from_pretrained(repo, folder, converter=lambda **_: made)
    if factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
    x_TD = torch.from_numpy(np.load(x))
    x_TD = x_TD if n_heads is None else x_TD.unflatten(1, (n_heads, -1))
    with torch.no_grad():
        latents = sae.encode(x_TD)
        reconstruction = forward(sae, x_TD).flatten(1)
    told = json.dumps({**sae.cfg.metadata.to_dict(), "d_out": getattr(sae.cfg, "d_out", None)})
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


def load_cross_layer(folder: str, x: str, out: str) -> None:
    """Latents [L, T, F/L] and predictions [L, T, D] of a cross-layer transcoder, as circuit-tracer loads it;
    what it saves again is in `out`-again."""
    import yaml
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    told = yaml.safe_load((Path(folder) / "config.yaml").read_text())
    assert told["model_kind"] == "cross_layer_transcoder"
    hooks = {name: told[name] for name in ("feature_input_hook", "feature_output_hook")}
    x_LTD = torch.from_numpy(np.load(x))
    for lazy in (False, True):
        clt = load_clt(folder, **hooks, device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=lazy)
        with torch.no_grad():
            latents = clt.encode(x_LTD)
            sparse, _ = clt.encode_sparse(x_LTD, zero_positions=slice(0, 0))
            assert torch.equal(sparse.to_dense(), latents)
            pos, layer, _, rows, _ = clt.select_decoder_vectors(latents)
            predictions = clt.compute_reconstruction(pos, layer, rows, x_LTD)
    clt.to_safetensors(f"{out}-again")
    np.savez(out, latents=latents.numpy(), predictions=predictions.numpy())


def without_embedders() -> None:
    """delphi imports these for other sources of examples, which are not used here. datasets, which others
    import after it, looks for one of them itself."""
    import datasets  # noqa: F401

    for name in ("faiss", "sentence_transformers", "blobfile", "orjson"):
        sys.modules.setdefault(name, ModuleType(name)).__dict__.setdefault("SentenceTransformer", object)


def read_delphi(folder: str, width: int, out: str) -> None:
    """Tokens [R, S] and codes [R, S, F] of a latent cache of one site, as delphi's dataset has them."""
    without_embedders()
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents.loader import LatentDataset

    data = LatentDataset(folder, SamplerConfig(), ConstructorConfig(), tokenizer=object())
    codes = torch.zeros(*data.tokens.shape, width)
    for buffer in data.buffers:
        assert buffer.module_path == data.modules[0]
        for latent in buffer:
            row, pos, number = latent.activation_data.locations.T
            assert bool((number == latent.latent.latent_index).all())
            codes[row, pos, number] = latent.activation_data.activations.float()
    np.savez(out, tokens=data.tokens.numpy(), codes=codes.numpy())


def read_dashboards(files: list[str]) -> None:
    """Batches go through SAEDashboard's own classes and come out as they were."""
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    for file in files:
        content = json.loads(Path(file).read_text())
        assert NeuronpediaDashboardBatch(**content).to_dict() == content, file


def read_core(files: list[str]) -> None:
    """Results of SAEBench's core evaluation are what its own classes ask for."""
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    for file in files:
        content = json.loads(Path(file).read_text())
        output = TypeAdapter(CoreEvalOutput).validate_python(content)
        assert json.loads(output.to_json())["eval_result_metrics"] == content["eval_result_metrics"]


def saelens_evals(sae: str, ids: str, x: str, ignored: int, out: str) -> None:
    """SAELens' own evals of an SAE on given activations [R, S, D], in one batch, without tokens of an id."""
    from sae_lens import evals
    from sae_lens.training.activation_scaler import ActivationScaler

    loaded, ids_RS, x_RSD = (
        saelens_sae(Path(sae)),
        torch.from_numpy(np.load(ids)),
        torch.from_numpy(np.load(x)),
    )

    class Given:
        """The activations in place of a model and of its tokens."""

        def run_with_cache(
            self, *_: Any, names_filter: list[str], **__: Any
        ) -> tuple[None, dict[str, Tensor]]:
            return None, {names_filter[0]: x_RSD}

        def get_batch_tokens(self, _: int) -> Tensor:
            return ids_RS

    wanted = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    given: Any = Given()
    metrics, of_latents = evals.get_sparsity_and_variance_metrics(
        loaded, given, given, ActivationScaler(), n_batches=1, eval_batch_size_prompts=len(ids_RS),
        model_kwargs={}, ignore_tokens=[ignored], **{f"compute_{name}": True for name in wanted},
    )  # fmt: skip
    of_latents |= evals.get_featurewise_weight_based_metrics(loaded)
    Path(out).write_text(json.dumps({"metrics": metrics, "feature_metrics": of_latents}))


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


def make_whitened_saelens(folder: str, folded: str, **config: Any) -> None:
    """A checkpoint with the whitening beside it, and the SAE that SAELens itself makes of both."""
    from sae_lens import TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    make_saelens(folder, training=True, normalize_activations="covariance_whitening", **config)
    generator = torch.Generator().manual_seed(5)
    d = config["d_in"]
    matrix = torch.eye(d) + torch.randn(d, d, generator=generator) / 10
    whitening = ActivationWhitening(torch.randn(d, generator=generator), matrix, matrix.inverse())
    ActivationScaler(whitening=whitening).save(str(Path(folder) / "activation_scaler.json"))
    sae = TrainingSAE.load_from_disk(folder)
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    sae.save_inference_model(folded)


def make_dictionary(folder: str, kind: str, d_in: int, num_latents: int, norm_factor: float = 0.0) -> None:
    """A class of dictionary_learning with random weights; with a factor, what later versions leave in
    mid-training: biases in units of activations that were divided by it."""
    without_their_data()
    from dictionary_learning import dictionary

    sae = getattr(dictionary, kind)(d_in, num_latents)
    randomize(sae, 4)
    trainer = {"dict_class": kind, "activation_dim": d_in, "dict_size": num_latents}
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text(json.dumps({"trainer": trainer}))
    state: dict[str, Any] = sae.state_dict()
    if norm_factor:
        sae.scale_biases(1 / norm_factor)
        optimizer = torch.optim.Adam(sae.parameters()).state_dict()
        state = {"step": 100, "ae": sae.state_dict(), "optimizer": optimizer, "config": trainer}
        state["norm_factor"] = norm_factor
    torch.save(state, Path(folder) / "ae.pt")


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


def read_rows_of_ids(folder: str, ctx_len: int, out: str) -> None:
    """All rows of a dataset of ids, as SAELens' store of activations and sparsify's trainer read them."""
    from types import SimpleNamespace

    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    data = Dataset.load_from_disk(folder)
    assert data.format["type"] == "torch"
    store = ActivationsStore(
        SimpleNamespace(tokenizer=None), data, streaming=False, hook_name="", hook_head_index=None,
        context_size=ctx_len, d_in=1, n_batches_in_buffer=1, total_training_tokens=1, prepend_bos=True,
        store_batch_size_prompts=1, train_batch_size_tokens=1, normalize_activations="none",
        device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    assert store.is_dataset_tokenized
    assert store.tokens_column == "input_ids"
    theirs = torch.stack(list(store._iterate_tokenized_sequences()))
    loaded = torch.utils.data.DataLoader(data.with_format("torch"), batch_size=4)
    sparsify = torch.cat([batch["input_ids"] for batch in loaded])
    np.savez(out, saelens=theirs.numpy(), sparsify=sparsify.numpy())


JOBS = {
    job.__name__: job
    for job in (
        encode, encode_published, load_set, load_cross_layer, make_sparsify,
        make_saelens, make_scaled_saelens,
        make_whitened_saelens, make_dictionary, make_dictionary_learning, hooks,
        splice, pretokenize, chunk_and_tokenize, read_rows_of_ids, read_delphi, read_dashboards, read_core,
        saelens_evals,
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
