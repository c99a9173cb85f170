"""Training crosscoders: from sites of one store, or of two models on the same tokens, to files that
reconstruct all of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from steps import make_bank, planted
from stores import make_store
from torch import Tensor
from training import D, config, files, killed_at, structured
from watching import held_out, lines

from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.joined import combined
from saemill.common.stores.mask import MaskConfig
from saemill.train.backends import sparse
from saemill.train.run import run
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.variant import Variant

pytestmark = pytest.mark.usefixtures("one_thread")
E = 11
EVERY = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated")
JOINED: dict[str, Any] = {"site": ("a+b",), "k": (4,), "num_latents": (48,)}
TWO: dict[str, Any] = JOINED | {"site": ("a+with.a",)}
SHAPE: dict[str, Any] = {"n_rows": 256, "ctx_len": 32, "d": D, "shard_tokens": 2048}


def turned(x_TD: Tensor, width: int) -> Tensor:
    """The same rows in another space, at another scale and place."""
    turn = torch.randn(D, width, generator=torch.Generator().manual_seed(3))
    return 40 * (x_TD - 30) @ turn - 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Site a, and at b, of another width, scale and place, what is turned of it."""
    x_TD = structured(256 * 32)
    return make_store(tmp_path_factory.mktemp("base"), values_TD=x_TD, b_TD=turned(x_TD, E), **SHAPE)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Another model on the same tokens, its site a as wide."""
    x_TD = turned(structured(256 * 32), D)
    return make_store(tmp_path_factory.mktemp("chat"), values_TD=x_TD, model="chat", **SHAPE)


def share(errors_TD: Tensor, x_TD: Tensor) -> float:
    return float(errors_TD.square().sum() / (x_TD - x_TD.mean(0)).square().sum())


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_a_step_is_that_of_the_sites_side_by_side(kernels: str) -> None:
    """Oracle: autograd of the formula in float64, of rows that are put side by side after each site is
    brought to its own units; one step of SGD, from which decoder rows come back to unit length."""
    x_TD, d = planted(1, 64, 20)[0], (12, 8)
    centre_D, scales = torch.linspace(-1, 1, 20), (0.5, 3.0)
    scale = 0.8
    scaling = Scaling(centre_D, scale, tuple(zip(d, scales, strict=True)))
    variant = Variant(
        name="v", site="a+b", k=3, num_latents=40, lr=0.5, optimizer="sgd", auxk_alpha=0, k_aux=1
    )
    (learner,) = (
        bank := make_bank([variant], scaling.standardise(x_TD), kernels=kernels, scaling=scaling)
    ).learners
    p = {name: value.detach().clone().double() for name, value in learner.parameters.named.items()}
    for value in p.values():
        value.requires_grad_()
    parts = zip(x_TD.split(d, 1), centre_D.split(d), scales, strict=True)
    y = torch.cat([(part.double() - centre.double()) * own for part, centre, own in parts], 1)
    w_enc, b_enc, w_dec, b = p.values()
    pre = (y - b) @ w_enc.T + b_enc
    kept = pre.topk(3).indices
    codes = torch.relu(torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept)))
    ((codes @ w_dec + b - y).square().sum() / (64 * 20)).backward()
    with torch.no_grad():
        bank.step(x_TD, 1.0, 0)
        rows = w_dec.grad - (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec
        expected = [value - 0.5 * value.grad for value in (w_enc, b_enc, b)]
        stepped = torch.nn.functional.normalize(w_dec - 0.5 * rows, dim=1)
    mine = learner.parameters
    for got, wanted in zip((mine.w_enc_FD, mine.b_enc_F, mine.b_D), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.w_dec_FD.double(), stepped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_free_rows_are_penalised_by_their_lengths_at_each_site(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: Lindsey et al. 2024, in float64 by autograd: the squared error, and λ times the sum over
    latents of the code times the sum over sites of the decoder row's norm there; one step of SGD. One latent
    is of one site alone: the penalty does not move it off that."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0)
    x_TD, d, lr, coefficient = planted(1, 64, 20)[0], (12, 8), 0.5, 0.05
    scaling = Scaling(torch.zeros(20), 1.0, ((12, 1.0), (8, 1.0)))
    variant = Variant(
        name="v", site="a+b", architecture="relu", num_latents=40, lr=lr, optimizer="sgd",
        l1_coefficient=coefficient, decoder_rows="free",
    )  # fmt: skip
    (learner,) = (bank := make_bank([variant], x_TD, kernels=kernels, scaling=scaling)).learners
    learner.parameters.w_dec_FD[3, 12:] = 0
    learner.parameters.w_dec_FD[:20] *= 1.7
    p = {name: value.detach().clone().double() for name, value in learner.parameters.named.items()}
    for value in p.values():
        value.requires_grad_()
    w_enc, b_enc, w_dec, b = p.values()
    codes = torch.relu((x_TD.double() - b) @ w_enc.T + b_enc)
    norms = sum(part.norm(dim=1) for part in w_dec.split(d, 1))
    penalty = (codes * norms).sum() / 20**0.5
    fvu = (codes @ w_dec + b - x_TD).square().sum() / 20
    ((fvu + coefficient * penalty) / 64).backward()
    with torch.no_grad():
        bank.step(x_TD, 1.0, 0)
        for name, value in p.items():
            mine = learner.parameters.named[name]
            torch.testing.assert_close(mine.double(), value - lr * value.grad, rtol=1e-4, atol=1e-5)
    assert codes.sum(0)[3] > 0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated"])
def test_what_is_saved_reconstructs_every_site(
    store: ActivationStore, tmp_path: Path, architecture: str
) -> None:
    """Oracle: the mean, whose FVU is 1; and the saved files in float64 on the held-out rows as the store has
    them, whose FVU at each site, and of all in the units of each, the run logged. Each site's scale makes
    its variance its width."""
    changes = JOINED | {
        "architecture": (architecture,), "target_l0": (4.0,), "max_tokens": 256 * 150, "log_every": 75,
        "eval_every": 75, "eval_tokens": 300,
    }  # fmt: skip
    changes |= {} if architecture == "jumprelu" else {"target_l0": ()}
    changes |= {"k": ()} if architecture in ("jumprelu", "gated") else {}
    (folder,) = run(config(store, tmp_path / "r", **changes))
    assert folder.name.startswith("a+b-")
    sae = Sae.load(folder).double()
    assert [(part.site, part.width) for part in sae.config.joined] == [("a", D), ("b", E)]
    x = {site: held_out(store, site, 300).double() for site in "ab"}
    error = sae(torch.cat(list(x.values()), 1)).reconstruction - torch.cat(list(x.values()), 1)
    errors = dict(zip("ab", error.split((D, E), 1), strict=True))
    figures = lines(tmp_path / "r")[150][folder.name]
    for site in "ab":
        assert figures[f"eval_fvu_at_{site}"] == pytest.approx(share(errors[site], x[site]), rel=1e-4)
        assert figures[f"eval_fvu_at_{site}"] < 0.5
    scales = {part.site: part.scale for part in sae.config.joined}
    whole = [torch.cat([scales[site] * rows[site] for site in "ab"], 1) for rows in (errors, x)]
    assert figures["eval_fvu"] == pytest.approx(share(*whole), rel=1e-4)
    for site, width in (("a", D), ("b", E)):
        variance = float(store.site(site).statistics.total_variance)
        assert scales[site] ** 2 * variance == pytest.approx(width, rel=1e-6)


def test_b_dec_beside_the_input_computes_the_same(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the error while training, in training units: what is saved, in the activations' own, has it."""
    changes = JOINED | {"apply_b_dec_to_input": False, "eval_every": 12, "log_every": 12}
    (folder,) = run(config(store, tmp_path / "r", **changes))
    last = lines(tmp_path / "r")[24][folder.name]
    assert last["eval_fvu"] == pytest.approx(last["fvu"], rel=0.3)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_every_architecture_resumes_bit_by_bit(
    store: ActivationStore,
    other: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernels: str,
) -> None:
    """Oracle: the same run without a stop, bit by bit: weights and metrics; of two stores."""
    changes = TWO | {
        "site": ("a+b", "a+with.a", "a+b+with.b"), "with_acts": other.path, "architecture": EVERY,
        "target_l0": (4.0,), "kernels": kernels,
    }  # fmt: skip
    run(config(store, tmp_path / "whole", **changes))
    killed_at(9, config(store, tmp_path / "cut", **changes), monkeypatch)
    run(config(store, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_beside_saes_it_is_as_alone(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: runs of one site with the same settings, bit by bit."""
    sites = ("a+b", "a", "b+a")
    together = run(config(store, tmp_path / "all", **JOINED | {"site": sites}))
    for i, (site, folder) in enumerate(zip(sites, together, strict=True)):
        (alone,) = run(config(store, tmp_path / str(i), **JOINED | {"site": (site,)}))
        assert (alone / "sae.safetensors").read_bytes() == (folder / "sae.safetensors").read_bytes()


def test_two_models_are_read_at_the_same_tokens(
    store: ActivationStore, other: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: both stores' own rows by address; the record and the SAE tell of both models."""
    both = ActivationStore(store.path, other.path)
    pair = both.site("a+with.a")
    assert pair.width == 2 * D
    expected = torch.cat([store.read("a", 100, 5000), other.read("a", 100, 5000)], 1)
    assert torch.equal(both.read("a+with.a", 100, 5000), expected)
    (folder,) = run(config(store, tmp_path / "r", with_acts=other.path, **TWO))
    finished = runs.finished(tmp_path / "r")
    assert (finished.acts, finished.with_acts) == (str(store.path), str(other.path))
    origin = Sae.load(folder).config.provenance
    assert (origin["model"], origin["with"]["model"]) == ("none", "chat")
    assert origin["acts_fingerprint"] == both.fingerprint != store.fingerprint
    assert runs.identity(tmp_path / "r").acts_fingerprint == both.fingerprint


def test_masks_of_two_stores_count_together() -> None:
    """Oracle: both masks applied to the tokens, one after the other."""
    ids_RS = np.random.default_rng(0).integers(0, 20, (40, 16))
    masks = [
        MaskConfig(first_positions=n, special_tokens=special, token_ids=ids)
        for n, special, ids in ((0, False, (3,)), (2, True, ()), (1, False, (5, 3)))
    ]
    for a in masks:
        for b in masks:
            expected = a.keep(ids_RS, (7,)) & b.keep(ids_RS, (7,))
            assert np.array_equal(combined(a, b).keep(ids_RS, (7,)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": ("a+a",)}, "site a\\+a joins a with itself"),
        ({"site": ("a+",)}, "lacks a name beside a \\+"),
        ({"site": ("a+c",)}, "site 'c' of .* not in the store; finished: a, b"),
        ({"site": ("a+with.a",)}, "joins one of another store; name that with --with-acts"),
        ({"loss": "mse"}, "loss mse is in the units of one site"),
        ({"loss": "kl"}, r"losses of the model read .*, and a\+b joins several; use loss fvu"),
        (
            {
                "variants": (
                    {"k": 4, "num_latents": 32},
                    {"site": "a", "k": 4, "num_latents": 32, "loss": "ce"},
                )
            },
            r"and a\+b joins several; use loss fvu, or train it in a run of its own",
        ),
        ({"target_site": ("a",)}, "got 2 to read, a\\+b, and 1 to predict, a"),
        ({"eval_losses_every": 10, "eval_every": 10, "log_every": 10}, "spliced in at several sites"),
    ],
)
def test_refusals(store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Oracle: the message; nothing was written."""
    with pytest.raises((ConfigError, StoreError), match=message):
        run(config(store, tmp_path / "r", **JOINED | changes))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"seed": 1}, "hashes of their tokens, or of what is held out, differ"),
        ({"n_rows": 128}, "it holds 128 rows of 32, not 256 rows of 32"),
        ({"shard_tokens": 1024}, "make it anew with --shard-tokens 2048"),
    ],
)
def test_stores_that_do_not_belong_together(
    store: ActivationStore, tmp_path: Path, shape: dict[str, Any], message: str
) -> None:
    """Oracle: the message; nothing was written."""
    n = shape.get("n_rows", 256) * 32
    other = make_store(tmp_path, values_TD=structured(n), model="chat", **SHAPE | shape)
    with pytest.raises(ConfigError, match=message):
        run(config(store, tmp_path / "r", with_acts=other.path, **TWO))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (("a",), "with_acts has no effect: .* as --site a\\+with.a"),
        (("with.a",), "is of with_acts alone; .* join it: a\\+with.a"),
    ],
)
def test_a_second_store_without_use(
    store: ActivationStore, other: ActivationStore, tmp_path: Path, sites: tuple[str, ...], message: str
) -> None:
    """Oracle: the message."""
    with pytest.raises(ConfigError, match=message):
        run(config(store, tmp_path / "r", with_acts=other.path, **JOINED | {"site": sites}))
    with pytest.raises(ConfigError, match="are the same store"):
        run(config(store, tmp_path / "r", with_acts=store.path, **TWO))


def test_damage_in_either_store_is_found(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: a byte of the second store's site that is changed behind its back."""
    other = make_store(tmp_path, values_TD=structured(256 * 32), model="chat", **SHAPE)
    shard = other.path / "a" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="differs from its hash"):
        run(config(store, tmp_path / "r", with_acts=other.path, **TWO))


def test_its_file_says_what_it_joins(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the config as it was saved, and fields in it that contradict each other. Other tools' formats
    have no place for it, and are refused by name."""
    (folder,) = run(config(store, tmp_path / "r", **JOINED))
    sae = Sae.load(folder)
    sae.save(tmp_path / "again")
    assert Sae.load(tmp_path / "again").config == sae.config
    for name in formats.NAMES:
        with pytest.raises(ConfigError, match=f"{name} cannot say that an SAE is a crosscoder over a and b"):
            formats.save(sae.parts, name, tmp_path / name)
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["joined"] == [asdict(part) for part in sae.config.joined]
    bad: list[tuple[Any, type[Exception]]] = [
        ([{"site": "a", "width": D, "scale": 1.0}], ConfigError),
        ([{"site": "a", "width": D, "scale": 1.0}, {"site": "b", "width": E + 1, "scale": 1.0}], ConfigError),
        ([{"site": "a", "width": D, "scale": -1.0}, {"site": "b", "width": E, "scale": 1.0}], ConfigError),
        ([{"site": "a", "width": D}], StoreError),
        ("a+b", StoreError),
    ]
    for joined, kind in bad:
        (folder / "cfg.json").write_text(json.dumps(cfg | {"joined": joined}))
        with pytest.raises(StoreError, match="its content differs from its checksum"):
            Sae.load(folder)
        unsealed = {k: v for k, v in cfg.items() if k != "saemill"} | {"joined": joined}
        plain = tmp_path / "plain"
        sae.save(plain)
        (plain / "cfg.json").write_text(json.dumps(unsealed))
        save_file(load_file(plain / "sae.safetensors"), plain / "sae.safetensors")
        with pytest.raises(kind, match="joined"):
            Sae.load(plain)


def test_a_crosscoder_starts_from_another(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the source's weights, from which a rate of almost 0 does not lead away; the messages where
    sites do not go together."""
    (source,) = run(config(store, tmp_path / "source", **JOINED, max_tokens=256 * 20))
    again: dict[str, Any] = {"k": (), "num_latents": (), "init_from": str(source), "max_tokens": 256 * 2}
    (folder,) = run(config(store, tmp_path / "again", **JOINED | again, lr=(1e-12,), auxk_alpha=0.0))
    before, after = Sae.load(source), Sae.load(folder)
    assert after.config.joined == before.config.joined
    for name, weights in before.parts.weights.items():
        torch.testing.assert_close(after.parts.weights[name], weights, rtol=1e-4, atol=1e-4)
    for site, message in (("a", "a crosscoder over a and b, and a is one site"), ("b+a", "joins widths")):
        with pytest.raises(ConfigError, match=message):
            run(config(store, tmp_path / "no", **JOINED | again | {"site": (site,)}))
