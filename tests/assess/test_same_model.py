"""Whether a model is the one whose activations were cached: copies are, changed ones are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from assessments import brief, entry
from pipeline import Pipeline
from reconstructions import (
    D,
)
from safetensors.torch import load_file, save_file

from saemill.assess.run import run
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common import durable, records
from saemill.common.errors import ConfigError
from saemill.common.models import cached
from saemill.common.records import Record
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import (
    Commit,
    SiteManifest,
    StoreSettings,
    group_of,
    read_site,
    record_path,
)


def changed(model: str, folder: Path, name: str) -> str:
    """A copy of a model with one weight's rows in reverse."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def tell(acts: Path, **values: Any) -> None:
    """Make a store tell other things of its model; the SAEs trained on it still know it."""
    store = ActivationStore(acts)
    plain = store.settings.model_dump(mode="json") | {"fingerprint": store.fingerprint}
    settings = StoreSettings.made(plain | values)
    durable.write_json(acts / "zarr.json", group_of(settings))
    for site in store.sites:
        of_site = read_site(acts, site).model_copy(update={"settings": settings})
        records.write(record_path(acts, site), of_site)
        kinds: list[tuple[Path, type[Record]]] = [(acts / site / "manifest.json", SiteManifest)]
        kinds += [(file, Commit) for file in (acts / site / "commits").iterdir()]
        for file, kind in kinds:
            found = records.read(file, kind, "")
            records.write(file, found.model_copy(update={"store": settings.identity}))


LAST_LAYER, HEAD = "gpt_neox.layers.2.mlp.dense_4h_to_h.weight", "embed_out.weight"


def test_a_copy_of_the_model_elsewhere_is_accepted(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the same weights in several files and another config: the figures of the original."""
    copy = tmp_path / "copy"
    model = transformers.AutoModelForCausalLM.from_pretrained(causal.model)
    model.config.use_cache = not model.config.use_cache
    model.save_pretrained(copy, max_shard_size="300KB")
    assert len(list(copy.glob("*.safetensors"))) > 1
    moved = shutil.copytree(causal.model, tmp_path / "moved")
    found = [run(brief(causal, tmp_path / "o", model=str(m))) for m in (causal.model, moved, copy)]
    assert entry(found[0], 16)["metrics"] == entry(found[1], 16)["metrics"] == entry(found[2], 16)["metrics"]
    assert [assessment["data"]["model_check"] for assessment in found] == [
        "the very files that were cached",
        "the very files that were cached",
        "the weights that were cached, in other files",
    ]


@pytest.mark.parametrize("part", [LAST_LAYER, HEAD])
def test_weights_that_no_cached_site_depends_on_are_compared(
    causal: Pipeline, tmp_path: Path, part: str
) -> None:
    """Oracle: one weight after the only cached site, flipped in a copy of the checkpoint."""
    other = changed(causal.model, tmp_path / "other", part)
    with pytest.raises(ConfigError, match="another model than the one that was cached: its weights differ"):
        run(brief(causal, tmp_path / "o", model=other))


def test_a_model_that_is_no_longer_in_its_place_is_asked_for(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the sentence, and its advice followed."""
    acts = Path(shutil.copytree(causal.acts, tmp_path / "acts"))
    tell(acts, model=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"gone, which is no longer there; say where with --model"):
        run(brief(causal, tmp_path / "o", acts=acts))
    assert run(brief(causal, tmp_path / "o", acts=acts, model=causal.model))["data"]["model_check"]


def test_a_model_that_was_changed_in_its_place_is_refused(
    causal: Pipeline, tmp_path: Path, tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: the head, flipped after the model was cached; in stores of old, too, that know the files' hash
    alone."""
    model = str(shutil.copytree(causal.model, tmp_path / "model"))
    found = Pipeline(tmp_path, model, tokenizer_folder, corpus, "layers.1")
    shutil.copytree(found.acts, tmp_path / "old")
    tell(tmp_path / "old", weights_fingerprint=None)
    shutil.rmtree(model)
    changed(causal.model, Path(model), HEAD)
    for acts in (found.acts, tmp_path / "old"):
        with pytest.raises(ConfigError, match="its files have changed since; name the right one"):
            run(brief(found, tmp_path / "o", acts=acts))
        assert run(brief(found, tmp_path / "o", acts=acts, model=causal.model))["data"]["model_check"]


def test_where_only_activations_can_be_compared_all_sites_are_and_it_is_told(
    causal: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a store as a hub id leaves it, of two sites: a change at the second is found, and one of the
    head, which cannot be, is told of."""
    acts = tmp_path / "acts"
    shutil.copytree(causal.acts, acts)
    cache(CacheConfig(tokens=causal.tokens, model=causal.model, out=acts, sites=("layers.2",), device="cpu"))
    tell(acts, model="someone/model", model_fingerprint="a commit", weights_fingerprint=None)
    last, head = (changed(causal.model, tmp_path / part, part) for part in (LAST_LAYER, HEAD))
    with pytest.raises(ConfigError, match=r"its activations at layers\.2 differ"):
        run(brief(causal, tmp_path / "o", acts=acts, model=last))
    told = run(brief(causal, tmp_path / "o", acts=acts, model=head))["data"]["model_check"]
    assert "only the activations at layers.1, layers.2 could be compared" in told
    assert f"what {head} computes after them, the head included, could not" in told
    assert told in capsys.readouterr().out
    written = json.loads((tmp_path / "o" / "final_assessment.json").read_text())
    assert written["data"]["model_check"] == told


def test_an_attention_sink_does_not_hide_another_model() -> None:
    """Oracle: by hand; the first token is a thousand times the others, which differ by half."""
    x_TD = torch.randn(32, D, generator=torch.Generator().manual_seed(0))
    x_TD[0] *= 1000
    y_TD = torch.cat([x_TD[:1], x_TD[1:] * 1.5])
    assert float((x_TD - y_TD).norm() / x_TD.norm()) < cached.SAME_ACTIVATIONS
    assert not cached._agree(y_TD, x_TD)
    assert cached._agree(x_TD * 1.01, x_TD)
    assert not cached._agree(x_TD[:, :4], x_TD)
