"""Losses of the model: gradients of an SAE at sites of several kinds, and the rows that they are of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caching import cache, tokenized
from steps import seen
from torch import Tensor

from saemill.common.stores.activations import ActivationStore
from saemill.train.backends.choose import make_backend
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.losses import Loss
from saemill.train.objective.model import ModelLoss
from saemill.train.stream.scaling import Scaling
from saemill.train.stream.whole_rows import Text, WholeRows
from saemill.train.sweep.variant import Variant

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ("layers.1", "layers.1.mlp", "layers.2", "layers.0.post_attention_layernorm")
F, K, N_ROWS = 64, 4, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(
    corpus: Path, tokenizer_folder: str, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """Residual streams, an MLP's output and its input, of a GPT-NeoX of 3 blocks."""
    folder = tmp_path_factory.mktemp("model-loss")
    tokens = tokenized(corpus, tokenizer_folder, folder / "tokens")
    return cache(tokens, tiny_models["neox"], folder / "acts", sites=SITES, dtype="fp32")


@pytest.fixture(scope="module")
def above(store: ActivationStore) -> ModelLoss:
    return ModelLoss(store, None, CPU)


def batch(store: ActivationStore, sites: tuple[str, ...]) -> tuple[Text, dict[str, Tensor]]:
    """The first batch of the stream."""
    mask = store.mask
    stream = WholeRows(
        store, list(sites), mask, batch_tokens=N_ROWS * store.ctx_len, buffer_tokens=2048, seed=3
    )
    text, rows = stream.text(0), stream.batch(0)
    stream.close()
    return text, rows


def bank_of(store: ActivationStore, above: ModelLoss, kernels: str, variant: Variant) -> Bank:
    """One learner on planted weights; without AuxK, in units of the store's sites by hand."""
    text, rows = batch(store, variant.sites)
    keep_T = text.keep_RS.flatten()
    scalings = {}
    for name in variant.sites:
        x_TD = rows[name][keep_T].float()
        scalings[name] = Scaling(x_TD.mean(0), float(1 / x_TD.std()))
    backend = make_backend(kernels, torch.float32)
    sample = {name: scaling.standardise(rows[name][keep_T]) for name, scaling in scalings.items()}
    target = None
    if variant.target_site is not None:
        target = variant.target_site, scalings[variant.target_site]
    learner = Learner(
        variant,
        scalings[variant.site],
        backend,
        sample[variant.site],
        10**9,
        None if target is None else (target[1], sample[target[0]]),
    )
    learner.parameters.b_enc_F.add_(0.1 * torch.randn(F, generator=torch.Generator().manual_seed(1)))
    for own_F in learner.parameters.further_F.values():
        own_F += 0.01 * torch.rand(F, generator=torch.Generator().manual_seed(2))
    learner.weights.refresh()
    return Bank(variant.site, scalings[variant.site], backend, [learner], target, above)


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Gradients as Adam saw them, from its first moment."""
    moments = learner.optimizer.tensors()
    return {name: moments[name][0] / (1 - learner.variant.adam_betas[0]) for name in learner.parameters.named}


def oracle(
    store: ActivationStore, model_name: str, bank: Bank, text: Text, rows: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradients in float64: transformers' own model as a whole, with a forward hook at the
    site that puts in the dense reconstruction, differentiated by autograd."""
    (learner,), keep_RS = bank.learners, text.keep_RS
    variant, architecture = learner.variant, learner.architecture
    leaves = {
        name: p.detach().double().clone().requires_grad_() for name, p in learner.parameters.named.items()
    }
    p = type(learner.parameters).of(leaves, learner.parameters)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_name).double().eval()
    model.requires_grad_(False)

    def units(site: str) -> Scaling:
        return bank.scaling if site == variant.site else bank.target[1]  # type: ignore[index]

    def standardised(site: str) -> Tensor:
        whole_TD: Tensor = (rows[site].double() - units(site).centre_D.double()) * units(site).scale
        return whole_TD[keep_RS.flatten()]

    x_TD, y_TE = standardised(variant.sites[0]), standardised(variant.sites[-1])
    known = seen(learner, p, x_TD)
    targeted_TE = y_TE if p.w_skip_ED is None else y_TE - x_TD @ p.w_skip_ED.T
    losses = architecture.loss(p, x_TD, targeted_TE, known, torch.float64)
    xhat_TE = losses.codes_TF @ p.w_dec_FD + p.b_D
    if p.w_skip_ED is not None:
        xhat_TE = xhat_TE + x_TD @ p.w_skip_ED.T
    of = units(variant.sites[-1])
    own_TE = xhat_TE / of.scale + of.centre_D.double()

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = first.masked_scatter(keep_RS[..., None], own_TE)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    clean = model(text.ids_RS).logits.log_softmax(-1)
    handle = model.base_model.get_submodule(variant.sites[-1]).register_forward_hook(hook)
    spliced = model(text.ids_RS).logits.log_softmax(-1)
    handle.remove()
    predicted_RS = keep_RS.clone()
    predicted_RS[:, -1] = False
    target_T = text.ids_RS.roll(-1, 1)[predicted_RS]
    log_p, log_q = clean[predicted_RS], spliced[predicted_RS]
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    ce = torch.nn.functional.cross_entropy(log_q, target_T)
    n_tokens, d = len(x_TD), y_TE.shape[1]
    per_square = 1 / (d * of.scale**2) if variant.loss == "mse+kl" else 1 / d
    squared = losses.error * per_square / n_tokens
    total = {"kl": kl, "ce": ce, "mse+kl": (squared + (squared / kl).detach() * kl) / 2}[variant.loss]
    total = total + losses.added * per_square / n_tokens
    total.backward()
    if architecture.unit_rows:
        w_dec = leaves["w_dec"]
        assert w_dec.grad is not None
        w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec.detach()
    return float(total.detach()), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


CASES: dict[str, dict[str, Any]] = {
    "kl": {"loss": "kl"},
    "ce": {"loss": "ce"},
    "mse+kl": {"loss": "mse+kl"},
    "kl, after the last block but one": {"loss": "kl", "site": "layers.2"},
    "kl, an MLP": {"loss": "kl", "site": "layers.1.mlp"},
    "ce, batchtopk": {"loss": "ce", "architecture": "batchtopk"},
    "mse+kl, matryoshka": {"loss": "mse+kl", "architecture": "matryoshka", "prefixes": (8, 24, F)},
    "mse+kl, jumprelu": {
        "loss": "mse+kl", "architecture": "jumprelu", "k": None, "target_l0": 4.0, "bandwidth": 0.1,
    },
    "kl, gated": {"loss": "kl", "architecture": "gated", "k": None, "l1_coefficient": 0.05},
    "mse+kl, skip transcoder": {
        "loss": "mse+kl", "site": "layers.0.post_attention_layernorm", "target_site": "layers.1.mlp",
        "skip_connection": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_the_whole_model(
    settings: dict[str, Any],
    kernels: str,
    store: ActivationStore,
    above: ModelLoss,
    tiny_models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: float64 autograd through transformers' own model with a forward hook at the site."""
    from saemill.train.backends import sparse

    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0)
    base: dict[str, Any] = {"site": "layers.1", "k": K, "auxk_alpha": 0.0, "lr": 1e-3}
    variant = Variant(name="v", num_latents=F, **base | settings)
    text, rows = batch(store, variant.sites)
    bank = bank_of(store, above, kernels, variant)
    loss, wanted = oracle(store, tiny_models["neox"], bank, text, rows)
    target_TE = None if variant.target_site is None else rows[variant.target_site]
    with torch.no_grad():
        bank.step(rows[variant.site], 1.0, 0, target_TE, text)
    (learner,) = bank.learners
    found = gradients(learner)
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        bound = 2e-3 * float(exact.abs().max()) + 1e-9
        torch.testing.assert_close(
            found[name].double(), exact, rtol=2e-3, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )
    means = learner.totals.window()
    assert means["loss"] == pytest.approx(loss, rel=1e-4)
    assert ("ce" if variant.loss == "ce" else "kl") in means


def test_blocks_before_a_residual_stream_do_not_run(store: ActivationStore, above: ModelLoss) -> None:
    """Oracle: forward hooks on every block; the residual stream after block 1 needs block 2, an MLP all."""
    ran: list[int] = []
    blocks = [above.model.modules[name] for name in above.model.blocks]
    handles = [
        block.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(blocks)  # type: ignore[union-attr]
    ]
    for site, expected in (("layers.1", {2}), ("layers.1.mlp", {0, 1, 2})):
        variant = Variant(name="v", site=site, num_latents=F, k=K, lr=1e-3, loss="kl", auxk_alpha=0.0)
        text, rows = batch(store, variant.sites)
        bank = bank_of(store, above, "torch", variant)
        above.check(site, *text)
        ran.clear()
        with torch.no_grad():
            bank.step(rows[site], 1.0, 0, None, text)
        assert set(ran) == expected
    for handle in handles:
        handle.remove()


def test_a_perfect_reconstruction_loses_nothing(store: ActivationStore, above: ModelLoss) -> None:
    """Oracle: KL of 0 and CE of the untouched model, by transformers, where x̂ is x."""
    from saemill.train.objective.model import Passages

    text, rows = batch(store, ("layers.1",))
    above.check("layers.1", *text)
    passages = Passages(above, "layers.1", *text, rows["layers.1"])
    x_TD = rows["layers.1"][text.keep_RS.flatten()]
    kinds: tuple[Loss, ...] = ("kl", "ce")
    kl, ce = (float(passages.loss(kind, x_TD)[0]) for kind in kinds)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(above.model.name).eval()
    predicted_RS = text.keep_RS.clone()
    predicted_RS[:, -1] = False
    with torch.no_grad():
        logits = model(text.ids_RS).logits[predicted_RS]
    clean = torch.nn.functional.cross_entropy(logits, text.ids_RS.roll(-1, 1)[predicted_RS])
    assert kl == pytest.approx(0, abs=1e-6)
    assert ce == pytest.approx(float(clean), abs=1e-5)


def test_rows_come_whole_and_once_per_epoch(store: ActivationStore) -> None:
    """Oracle: the store's own reading of tokens and activations by address."""
    stream = WholeRows(store, ["layers.1"], store.mask, batch_tokens=64, buffer_tokens=1024, seed=1)
    n_batches = stream.epoch_tokens // 64
    ids_RS = torch.cat([stream.text(i).ids_RS for i in range(n_batches)])
    x_RSD = torch.cat([stream.batch(i)["layers.1"] for i in range(n_batches)]).view(
        len(ids_RS), store.ctx_len, -1
    )
    all_ids = store.tokens.rows(0, store.tokens.n_rows).astype(np.int64)
    number = {tuple(row): i for i, row in enumerate(all_ids.tolist())}
    rows = [number[tuple(row)] for row in ids_RS.tolist()]
    assert len(set(rows)) == len(rows) == (~store.tokens.held_out_R).sum() // 2 * 2
    assert not store.tokens.held_out_R[rows].any()
    assert rows != sorted(rows)
    for row, x_SD in zip(rows[::7], x_RSD[::7], strict=True):
        start = row * store.ctx_len
        assert torch.equal(x_SD, store.read("layers.1", start, start + store.ctx_len))
    later = stream.text(n_batches + 1).ids_RS
    assert [number[tuple(row)] for row in later.tolist()] != rows[2:4]
    stream.close()
