"""`saemill latent`: any latents of an SAE, in the terminal and on a page."""

from pathlib import Path

import pytest
from pages import Page
from pipeline import Pipeline

from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.latent import run
from saemill.assess.run import run as assess
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import features, runs


def test_a_latent_is_shown_as_the_assessment_shows_it(
    causal: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the record of an assessment that was asked for the same latents; the page and the terminal
    have them all."""
    assess(
        AssessConfig(
            run=causal.out, device="cpu", with_model=False, n_latents=0, latents=(5, 9), out=tmp_path
        )
    )
    expected = features.load(tmp_path)
    capsys.readouterr()
    page = tmp_path / "some" / "latents.html"
    page.parent.mkdir()
    found = run(LatentConfig(run=causal.out / expected.variant, latents=("9", "5"), out=page, device="cpu"))
    by_number = {latent.latent: latent for latent in expected.latents}
    assert [latent.latent for latent in found.latents] == [9, 5]
    assert all(latent == by_number[latent.latent] for latent in found.latents)
    shown = capsys.readouterr().out
    for latent in found.latents:
        assert f"latent {latent.latent} of {expected.variant}: active on {latent.density:.3%}" in shown
        assert f"promotes: {latent.effects[0].promoted[0].text!r}" in shown
        for context in latent.contexts:
            assert f"{context.activation:7.2f}  …" in shown
    ids = [attrs["id"] for tag, attrs in Page(page.read_text()).tags if attrs.get("class") == "latent"]
    assert ids == ["latent-9", "latent-5"]
    many = run(LatentConfig(run=causal.out / expected.variant, latents=("0-127",), n_samples=0, device="cpu"))
    assert [latent.latent for latent in many.latents] == list(range(128))
    never = [latent.latent for latent in many.latents if not latent.n_active]
    told = capsys.readouterr().out
    assert all(f"latent {latent} of {expected.variant}: active on 0.000%" in told for latent in never)


def test_which_sae_is_meant_must_be_clear(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the messages, and the advice in them; without a name that SAE is meant which the assessment
    shows."""
    several = LatentConfig(run=causal.out, latents=("1",), device="cpu", context_tokens=500)
    (causal.out / runs.FEATURES).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"has 2 SAEs; name the folder of one, as (.*)") as refused:
        run(several)
    advised = Path(str(refused.value).rpartition(" as ")[2])
    found = run(LatentConfig(run=advised, latents=("1",), device="cpu", context_tokens=500))
    assert found.variant == advised.name
    assess(AssessConfig(run=causal.out, device="cpu", with_model=False, n_latents=1))
    assert run(several).variant == features.load(causal.out).variant
    with pytest.raises(StoreError, match="is no finished run"):
        run(LatentConfig(run=tmp_path / "nothing", latents=("1",)))
    with pytest.raises(ConfigError, match=r"latents must be in 0\.\.127, got 128"):
        run(LatentConfig(run=advised, latents=("128",)))
    with pytest.raises(ConfigError, match="latents must be at most 2,000 at once, got 2,001"):
        run(LatentConfig(run=advised, latents=("0-2000",)))
    with pytest.raises(ConfigError, match=r"out must be a page, as .*latents\.html, got the folder"):
        LatentConfig(run=advised, latents=("1",), out=tmp_path)
    with pytest.raises(ConfigError, match="latents must name one or more, as 7 or 0-99, got none"):
        LatentConfig(run=advised, latents=())
