"""Assessments of cross-layer transcoders: all sites replaced at once, codes kept from layer to layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caching import cache, tokenized
from torch import Tensor
from training import config

from saemill import Sae
from saemill.assess import measure
from saemill.assess.baselines import Baselines, fit_baselines
from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.latent import run as show
from saemill.assess.reader import Pieces
from saemill.assess.run import run
from saemill.common.errors import ConfigError
from saemill.common.steer.across_layers import AcrossLayers
from saemill.common.stores.activations import ActivationStore
from saemill.train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")
L, D = 3, 32
READS = [f"layers.{layer}.post_attention_layernorm" for layer in range(L)]
WRITES = [f"layers.{layer}.mlp" for layer in range(L)]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Path:
    """A run of two on all MLPs of a tiny model whose weights are large enough to matter."""
    folder = tmp_path_factory.mktemp("across")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["neox"])
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder / "model")
    tokens = tokenized(corpus, tokenizer_folder, folder / "tokens", held_out_fraction=0.3)
    store = cache(tokens, str(folder / "model"), folder / "acts", sites=(*READS, *WRITES))
    changes: dict[str, Any] = {
        "site": ("layers.*.post_attention_layernorm",), "target_site": ("layers.*.mlp",), "cross_layer": True,
        "architecture": ("topk", "jumprelu"), "k": (6,), "target_l0": (6.0,), "num_latents": (96,),
        "skip_connection": True,
    }  # fmt: skip
    train(config(store, folder / "run", **changes))
    changes |= {"cross_layer": False, "k": (2,), "target_l0": (2.0,), "num_latents": (32,)}
    train(config(store, folder / "each", **changes))
    return folder


class ByHand:
    """Oracle: transformers' own model, and hooks on its modules."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.modules = dict(self.model.base_model.named_modules())
        store = ActivationStore(folder / "acts")
        rows = np.flatnonzero(store.tokens.held_out_R)
        ids = [store.tokens.rows(row, row + 1) for row in rows]
        self.ids_RS = torch.from_numpy(np.concatenate(ids).astype(np.int64))
        self.where_RS = (self.ids_RS != 0) & (torch.arange(32) >= 1)

    def loss(self, hooks: Mapping[str, Callable[..., Tensor | None]]) -> float:
        """Mean next-token loss at the unmasked positions, with forward hooks of some modules."""
        handles = [self.modules[site].register_forward_hook(hook) for site, hook in hooks.items()]
        with torch.no_grad():
            log_probs = self.model(self.ids_RS).logits[:, :-1].log_softmax(-1)
        for handle in handles:
            handle.remove()
        counted = self.where_RS[:, :-1]
        return float(-log_probs[counted].gather(1, self.ids_RS[:, 1:][counted][:, None]).mean())

    def replaced(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.where(self.where_RS[..., None], other, x)

    def instead(self, others: Mapping[str, Tensor]) -> float:
        """The loss with other activations at some sites, all at once."""
        return self.loss({site: lambda _m, _i, y, o=o: self.replaced(y, o) for site, o in others.items()})

    def spliced(self, sae: Sae, written: dict[str, Tensor] | None = None) -> float:
        """The loss with an SAE's predictions in the place of every layer's, of what the model that they
        change has there. Of layers not reached yet the codes are those of 0; they do not write here."""
        written = {} if written is None else written
        seen = dict.fromkeys(READS, torch.zeros(*self.ids_RS.shape, D))
        hooks: dict[str, Callable[..., Tensor | None]] = {}
        for layer, (reads, writes) in enumerate(zip(READS, WRITES, strict=True)):
            hooks[reads] = lambda _m, _i, x, at=reads: seen.update({at: x})
            hooks[writes] = lambda _m, _i, y, layer=layer: self.replaced(
                y,
                written.setdefault(
                    WRITES[layer], sae(torch.cat(list(seen.values()), -1)).reconstruction.split(D, -1)[layer]
                ),
            )
        return self.loss(hooks)

    def each_spliced(self, saes: Sequence[Sae], written: dict[str, Tensor]) -> float:
        """The loss with a transcoder's prediction in the place of each layer's MLP."""
        seen: dict[int, Tensor] = {}
        hooks: dict[str, Callable[..., Tensor | None]] = {}
        for layer, (reads, writes, sae) in enumerate(zip(READS, WRITES, saes, strict=True)):
            hooks[reads] = lambda _m, _i, x, layer=layer: seen.update({layer: x})
            hooks[writes] = lambda _m, _i, y, layer=layer, sae=sae: self.replaced(
                y, written.setdefault(WRITES[layer], sae(seen[layer]).reconstruction)
            )
        return self.loss(hooks)


def check_errors_of_all_replaced(
    entry: Mapping[str, Any],
    by_hand: ByHand,
    own: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    store: ActivationStore,
) -> None:
    """FVU at each site of what was written there, beside the untouched model's."""
    cuts = {cut["name"]: cut["metrics"] for cut in entry["cuts"]}
    counted_RS = by_hand.where_RS.clone()
    counted_RS[:, -1] = False
    for site in WRITES:
        squares = (own[site] - store.site(site).statistics.mean_D)[counted_RS].square().sum()
        fvu = float((own[site] - written[site])[counted_RS].square().sum() / squares)
        assert cuts[f"at {site}"]["fvu_replaced"]["value"] == pytest.approx(fvu, rel=1e-3)


def left_by_skip(sae: Sae, own: Mapping[str, Tensor], by_hand: ByHand, store: ActivationStore) -> float:
    """FVU of each layer's linear map alone, around the cached means, with every site scaled to vary alike."""
    assert sae.W_skip is not None
    left = total = 0.0
    for reads, writes, W_DD in zip(READS, WRITES, sae.W_skip.split(D), strict=True):
        x, y = (own[site][by_hand.where_RS] - store.site(site).statistics.mean_D for site in (reads, writes))
        variance = store.site(writes).statistics.total_variance
        left += float((y - x @ W_DD.double().T).square().sum()) / variance
        total += float((y - y.mean(0)).square().sum()) / variance
    return left / total


def test_losses_are_those_of_the_model_that_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: transformers' own model with hooks on its modules: every MLP's output replaced by predictions
    from what the changed model has; all of them by zeros, and by the cached means; of a baseline, by what it
    makes of the untouched model's; and one at a time."""
    by_hand, store = ByHand(folder), ActivationStore(folder / "acts")
    fitted: dict[str, Sae] = {}

    def noting(*given: Any) -> Baselines:
        baselines = fit_baselines(*given)
        fitted.update(baselines.saes)
        return baselines

    monkeypatch.setattr(measure, "fit_baselines", noting)
    assessment = run(AssessConfig(run=folder / "run", device="cpu", model_tokens=10**6, n_latents=2))
    own: dict[str, Tensor] = {}
    clean = by_hand.loss({s: lambda _m, _i, y, s=s: own.update({s: y}) for s in (*READS, *WRITES)})
    means = {site: store.site(site).statistics.mean_D.float().expand_as(own[site]) for site in WRITES}
    zero, mean = by_hand.instead({s: torch.zeros_like(own[s]) for s in WRITES}), by_hand.instead(means)
    assert zero - clean > 0.01
    for entry in assessment["variants"]:
        sae, figures = Sae.load(folder / "run" / entry["name"]), entry["metrics"]
        cost = by_hand.spliced(sae) - clean
        assert figures["delta_ce"]["value"] == pytest.approx(cost, rel=1e-3, abs=1e-5)
        assert figures["loss_recovered"]["value"] == pytest.approx(1 - cost / (zero - clean), rel=1e-3)
        assert figures["ce_mean"]["value"] == pytest.approx(mean, rel=1e-4)
        made = sae(torch.cat([own[site] for site in READS], -1)).reconstruction.split(D, -1)
        cuts = {cut["name"]: cut["metrics"] for cut in entry["cuts"]}
        for site, part in zip(WRITES, made, strict=True):
            alone = by_hand.instead({site: part}) - clean
            assert cuts[f"at {site}"]["delta_ce"]["value"] == pytest.approx(alone, rel=1e-3, abs=1e-5)
        together = by_hand.instead(dict(zip(WRITES, made, strict=True))) - clean
        assert abs(together - cost) > 1e-4  # it matters which model is encoded
        assert figures["fvu_skip"]["value"] == pytest.approx(left_by_skip(sae, own, by_hand, store), rel=1e-3)
        written: dict[str, Tensor] = {}
        by_hand.spliced(sae, written)
        check_errors_of_all_replaced(entry, by_hand, own, written, store)
    kinds = {check["against"]: check for check in assessment["variants"][0]["evidence"] if check["against"]}
    assert set(kinds) == {next(name for name in kinds if name.startswith("random-"))}
    for entry in assessment["controls"]:
        made = fitted[entry["name"]](torch.cat([own[site] for site in WRITES], -1)).reconstruction
        cost = by_hand.instead(dict(zip(WRITES, made.split(D, -1), strict=True))) - clean
        assert entry["metrics"]["delta_ce"]["value"] == pytest.approx(cost, rel=1e-3, abs=1e-5)
    assert (folder / "run" / "report.html").stat().st_size > 0


def test_transcoders_of_one_layer_each_are_measured_together(folder: Path) -> None:
    """Oracle: transformers' own model with a hook on each module, which puts each transcoder's prediction of
    what the model that the others changed has there in its place."""
    by_hand, store, own = ByHand(folder), ActivationStore(folder / "acts"), dict[str, Tensor]()
    settings = AssessConfig(run=folder / "each", device="cpu", model_tokens=10**6, n_latents=0, together=True)
    assessment = run(settings)
    clean = by_hand.loss({s: lambda _m, _i, y, s=s: own.update({s: y}) for s in (*READS, *WRITES)})
    sets = [entry for entry in assessment["controls"] if entry.get("control") == "together"]
    assert [entry.get("architecture", "topk") for entry in sets] == ["topk", "jumprelu"]
    for entry in sets:
        kind = entry.get("architecture", "k2")
        places = sorted((folder / "each").glob(f"*-{kind}-*"))
        saes, written = [Sae.load(place) for place in places], dict[str, Tensor]()
        cost = by_hand.each_spliced(saes, written) - clean
        figures = entry["metrics"]
        assert figures["delta_ce"]["value"] == pytest.approx(cost, rel=1e-3, abs=1e-5)
        check_errors_of_all_replaced(entry, by_hand, own, written, store)
        alone = {e["name"]: e["metrics"] for e in assessment["variants"]}
        l0s = [alone[place.name]["l0"]["value"] for place in places]
        assert figures["l0"]["value"] == pytest.approx(sum(l0s))
        for place, site in zip(places, WRITES, strict=True):
            (cut,) = (cut["metrics"] for cut in entry["cuts"] if cut["name"] == f"at {site}")
            for figure in ("fvu", "delta_ce"):
                expected = alone[place.name][figure]["value"]
                assert cut[figure]["value"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with pytest.raises(ConfigError, match=r"together has no effect: no transcoders"):
        run(replace(settings, run=folder / "run"))


def test_tokens_are_promoted_by_the_sum_of_what_a_latent_writes(folder: Path) -> None:
    """Oracle: transformers' final norm and head by hand, on the sum of a latent's rows at its own layer and
    all later ones."""
    (path,) = (folder / "run").glob("*jumprelu*")
    found = show(LatentConfig(run=path, latents=("0", "40", "80"), device="cpu"))
    assert [place.at for place in found.vocabularies] == ["layers.0.mlp to layers.2.mlp, added up"]
    model = ByHand(folder).model
    norm_D = model.base_model.final_layer_norm.weight.detach()
    head_VD = model.get_output_embeddings().weight.detach()
    store = ActivationStore(folder / "acts")
    pieces = Pieces(store.tokens)
    for latent in found.latents:
        at, layer = latent.latent % 32, latent.latent // 32
        own = Sae.load(path).layers[layer].W_dec[at].detach().view(L - layer, D).sum(0)
        logits_V = head_VD @ (norm_D * (own - own.mean()))
        down = logits_V[: store.tokens.tokenizer.vocab_size].topk(10, largest=False).indices.tolist()
        assert [t.text for t in latent.effects[0].suppressed] == [pieces.text(i) for i in down]


def test_sites_in_another_order_than_the_models_are_refused(folder: Path) -> None:
    """Oracle: the message, where a layer's target comes before what is read for it."""
    sae = Sae.load(next(iter(sorted((folder / "run").glob("*jumprelu*")))))
    edits = AcrossLayers(sae).in_place(torch.ones(2, 5, dtype=torch.bool))
    x_BSD = torch.randn(2, 5, D)
    edits[READS[0]](x_BSD)
    assert edits[WRITES[0]](x_BSD).shape == x_BSD.shape
    with pytest.raises(ConfigError, match=rf"{WRITES[1]} runs before {READS[1]}"):
        edits[WRITES[1]](x_BSD)
