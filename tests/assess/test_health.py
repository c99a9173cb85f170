"""Tables of the dictionary's health, and the L0 at which c_dec is least."""

from typing import Any

from saemill.assess.health import MOST_DENSE, dense_rows, health_rows, least_c_dec, least_c_dec_sentences


def entry(k: int, c_dec: float | None, **values: Any) -> dict[str, Any]:
    figures = {
        "l0": k,
        "c_dec": c_dec,
        "c_dec_random": 0.05,
        "duplicate_fraction": 0.5,
        "antipodal_fraction": 0,
    }
    metrics = {name: {"value": value} for name, value in figures.items()}
    traits = {"site": "a", "architecture": "topk", "num_latents": 64, "seed": 0, "not_measured": None}
    return {"name": f"k{k}", "metrics": metrics} | traits | values


def found_among(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("site", "architecture", "num_latents", "seed", "lr")
    settings = {e["name"]: {name: e.get(name) for name in names} for e in entries}
    return least_c_dec(entries, settings)


def test_the_least_c_dec_is_looked_for_among_sparsities_alone() -> None:
    """Oracle: worked by hand; widths, seeds and learning rates are not compared, nor fewer than three L0."""
    entries = [entry(k, c) for k, c in ((64, 0.2), (8, 0.3), (16, 0.1), (32, 0.15), (128, None))]
    others = [entry(k, 0.01, num_latents=128, name=f"wide{k}") for k in (8, 16)]
    others += [entry(16, 0.02, seed=1, name="other seed")]
    unmeasured = entry(4, 0.001, not_measured="diverged")
    (found,) = found_among([*entries, *others, unmeasured])
    assert found == {
        "variants": ["k8", "k16", "k32", "k64"], "least": "k16", "l0": 16, "c_dec": 0.1, "at_end": False
    }  # fmt: skip
    (at_end,) = found_among([entry(k, k / 100) for k in (8, 16, 32)])
    assert (at_end["least"], at_end["at_end"]) == ("k8", True)
    assert found_among(others) == []
    rates = [entry(k, k / 100) | {"name": f"k{k}-lr{lr}", "lr": lr} for k in (8, 16) for lr in (1, 2)]
    assert found_among([*rates, entry(32, 0.3) | {"lr": 1}]) == [
        {"variants": ["k8-lr1", "k16-lr1", "k32"], "least": "k8-lr1", "l0": 8, "c_dec": 0.08, "at_end": True}
    ]
    sentences = least_c_dec_sentences([found, at_end])
    assert sentences[0].endswith("of 4 SAEs that differ in sparsity alone, which speaks for an L0 near it")
    assert sentences[1].endswith("an end of what was trained, so that the L0 that fits may lie beyond it")


def test_dense_latents_are_counted_by_kind() -> None:
    """Oracle: counted by hand; of very many the first are listed."""
    latent = {
        "latent": 1, "density": 0.5, "kind": "antipodal", "antipode": 2, "decoder_cosine": -0.9,
        "encoder_cosine": -0.8, "with_position": None, "with_length": 0.1, "with_component": 0.25,
    }  # fmt: skip
    kinds = ["antipodal", "position", "position", "length", "component", "other", "other", "other"]
    variant = entry(8, 0.1, dense=[latent | {"kind": kind} for kind in kinds])
    titles, row = health_rows([variant, entry(4, 0.1, not_measured="diverged")])
    assert dict(zip(titles, row, strict=True)) == {
        "SAE": "k8", "c_dec": "0.100", "(random)": "0.050", "duplicates": "50.0%", "antipodal": "0.0%",
        "dense": "8", "by position": "2", "by length": "1", "by component": "1", "in pairs": "1",
        "other": "3",
    }  # fmt: skip
    _, first, *_ = dense_rows(variant)
    assert first == ["1", "50.0%", "antipodal", "2 (-0.90, -0.80)", "–", "0.10", "0.25"]
    assert dense_rows(entry(8, 0.1)) == []
    assert len(dense_rows(entry(8, 0.1, dense=[latent] * 100))) == 1 + MOST_DENSE
