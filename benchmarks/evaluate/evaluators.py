"""Run by the peers' Python: SAELens' evals, SAEBench's core, and what sparsify and dictionary_learning say.

`benchmarks.evaluate.others` starts it on a folder, where it reads what was put there and writes figures to
`theirs/VARIANT.json`. It knows nothing of saemill. Each package's own loader and its own evaluation run. The
model is read from disk, into TransformerLens' bridge with its weights as they are: `multiple_evals` of
SAELens and of SAEBench would fetch one by an official name.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from sae_bench.evals.core import main as saebench_core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE, evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sparsify import SparseCoder
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

# dictionary_learning imports these for its buffers over models, which are not used here.
for name, attribute in (("nnsight", "LanguageModel"), ("zstandard", "ZstdDecompressor")):
    sys.modules.setdefault(name, ModuleType(name)).__dict__.setdefault(attribute, object)

from dictionary_learning.evaluation import evaluate  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

Figures = dict[str, float]
PACKAGES = ("sae-lens", "sae-bench", "transformer-lens", "eai-sparsify", "dictionary-learning", "torch")


class Rows:
    """The model and the rows that SAELens and SAEBench evaluate on."""

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.ids_RS = torch.from_numpy(np.load(folder / "tokens.npy"))
        self.special_ids, self.batch_rows = request["special_ids"], request["batch_rows"]
        self.n_batches = len(self.ids_RS) // self.batch_rows
        tokenizer = transformers.AutoTokenizer.from_pretrained(request["tokenizer"])
        self.model = TransformerBridge.boot_transformers(request["model"], device="cpu", tokenizer=tokenizer)

    def hook_error(self, hook: str, x_RSD: Tensor) -> float:
        """Compute the largest difference between a hook's activations of the first rows and those given, over
        the root mean square of these."""
        with torch.no_grad():
            _, cache = self.model.run_with_cache(self.ids_RS[: len(x_RSD)], names_filter=[hook])
        return float((cache[hook] - x_RSD).abs().max() / x_RSD.square().mean().sqrt())

    def store(self, sae: Any) -> Any:
        """Wrap the rows as both tools read them. Their passes read on where the one before ended, so each
        must take all rows."""
        dataset = Dataset.from_dict({"input_ids": self.ids_RS.tolist()})
        options = {"context_size": self.ids_RS.shape[1], "streaming": False}
        return ActivationsStore.from_sae(self.model, sae, dataset, total_tokens=len(dataset), **options)

    def batches(self) -> dict[str, int]:
        names = ("n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches")
        return {"batch_size_prompts": self.batch_rows} | dict.fromkeys(names, self.n_batches)


def saelens(folder: str, rows: Rows) -> Figures:
    """Run SAELens' `run_evals` with everything on."""
    sae = SAE.load_from_disk(folder)
    config = evals.get_eval_everything_config(**rows.batches())
    groups = evals.run_evals(
        sae,
        rows.store(sae),
        rows.model,
        ActivationScaler(),
        config,
        exclude_special_tokens=rows.special_ids,
    )
    return flat(*groups)


def saebench(folder: str, rows: Rows, exclude: bool) -> Figures:
    """Run SAEBench's `run_evals` of the core evaluation. `exclude`: special tokens keep their activations."""
    _, sae, _ = load_and_format_sae("here", SAE.load_from_disk(folder), "cpu")
    options = {"compute_featurewise_density_statistics": True} if exclude else {}
    for name in ("kl", "ce_loss", *(["l2_norms", "sparsity_metrics", "variance_metrics"] * exclude)):
        options[f"compute_{name}"] = True
    config = CoreEvalConfig(exclude_special_tokens_from_reconstruction=exclude, **rows.batches(), **options)
    store = rows.store(sae)
    return flat(*saebench_core.run_evals(sae, store, rows.model, config, ignore_tokens=set(rows.special_ids)))


def flat(metrics: dict[str, dict[str, float]], features: dict[str, list[float]]) -> Figures:
    """Join groups of figures; of the latents, the share that never fired; what splicing costs."""
    figures = {name: value for group in metrics.values() for name, value in group.items()}
    if density := features.get("feature_density"):
        figures["never_fired"] = float(np.mean(np.array(density) == 0))
    figures["delta_ce"] = figures["ce_loss_with_sae"] - figures["ce_loss_without_sae"]
    return figures


def sparsify(folder: str, batches: list[Tensor]) -> Figures:
    """Compute the mean over batches of the FVU that its forward pass returns."""
    sae = SparseCoder.load_from_disk(folder)
    with torch.no_grad():
        return {"fvu": float(np.mean([sae(x_TD).fvu.item() for x_TD in batches]))}


def dictionary_learning(folder: str, batches: list[Tensor]) -> Figures:
    """Run dictionary_learning's `evaluate` on activations."""
    sae, _ = load_dictionary(folder, "cpu")
    figures: Figures = evaluate(sae, iter(batches), n_batches=len(batches))
    return figures


def evaluate_all(variant: dict[str, str], rows: Rows, batch_tokens: int) -> dict[str, Figures]:
    """Evaluate one SAE by every package."""
    batches = list(torch.from_numpy(np.load(variant["x"])).split(batch_tokens))
    return {
        "saelens": saelens(variant["saelens"], rows),
        "saebench": saebench(variant["saelens"], rows, exclude=True),
        "saebench, special tokens replaced": saebench(variant["saelens"], rows, exclude=False),
        "sparsify": sparsify(variant["sparsify"], batches),
        "dictionary_learning": dictionary_learning(variant["dictionary_learning"], batches),
    }


def main(folder: Path) -> None:
    """Evaluate every variant that was not evaluated yet."""
    request, results = json.loads((folder / "asked.json").read_text()), folder / "theirs"
    torch.set_num_threads(request["threads"])
    rows = Rows(folder, request)
    results.mkdir(exist_ok=True)
    for name, variant in request["variants"].items():
        if not (results / f"{name}.json").exists():
            print(name, flush=True)
            figures = evaluate_all(variant, rows, request["batch_tokens"])
            (results / f"{name}.json").write_text(json.dumps(figures, indent=1))
    errors = {
        hook: rows.hook_error(hook, torch.from_numpy(np.load(file)))
        for hook, file in request["hooks"].items()
    }
    about = {"versions": {name: version(name) for name in PACKAGES}, "hook_error": errors}
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
