"""`saemill export` and `saemill import`: SAEs to and from other tools."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.models.sites import load_model_config
from saemill.common.records import first_finding
from saemill.common.sae import formats
from saemill.common.sae.formats.hooks import Hook, denotes, hook_of, site_of
from saemill.common.sae.sae import Sae
from saemill.common.stores.site_names import JOINT
from saemill.common.stores.site_roles import Role


def export(path: Path | str, name: str, out: Path, model: str | None = None) -> None:
    """Write an SAE as another tool saves it.

    Args:
        path: an SAE's folder, or hf://user/repo/folder.
        name: the format; not circuit-tracer, whose sets `saemill.transcoder_set` writes.
        out: where to; a new or empty folder.
        model: hub id or folder of the model, if not where it was cached from.

    Raises:
        StoreError: no SAE there, or a damaged one.
        ConfigError: an unknown format, an output in use, or a model that cannot be found.
        DiskError: the disk is full, or the folder may not be written to.
    """
    check_new(out)
    sae = Sae.load(path)
    provenance = sae.config.provenance
    if model:
        provenance |= {"model": model, "revision": None}
    hook, target = None, None
    if name != "sparsify" and not sae.config.joined:  # which no format takes
        hook = _hook(sae.site, provenance)
        target = _hook(sae.target_site, provenance) if sae.is_transcoder else None
    with new(out) as partial:
        formats.save(sae.parts, name, partial, hook, target)
    places = " → ".join(place.name for place in (hook, target) if place)
    say(f"{out}: {name}, {sae.config.described}" + (f", {places}" if places else ""))


def _hook(site: str | None, provenance: Mapping[str, Any]) -> Hook | None:
    """Find the site's hook in TransformerLens' terms; where it has none, the user is warned."""
    model = provenance.get("model")
    if site is None or model is None:
        say("no hook name is written: the SAE's folder does not tell its site and model")
        return None
    config = config_of(model, provenance.get("revision"), bool(provenance.get("trust_remote_code")))
    hook, role = hook_of(site, config.model_type), role_of(site, provenance)
    if hook is None:
        say(f"no hook name is written: TransformerLens has none for {site} of {config.model_type}")
    elif not denotes(hook, role):
        assert role is not None
        say(
            f"no hook name is written: {site} is {role.described}; TransformerLens' {hook.name} is what is "
            "added as it is"
        )
        return None
    return hook


def role_of(site: str, provenance: Mapping[str, Any]) -> Role | None:
    """Read what was found at a site of an SAE; None where its folder does not tell.

    Raises:
        StoreError: what the folder tells is damaged.
    """
    known = provenance.get("roles")
    if not isinstance(known, dict) or site not in known:
        return None
    try:
        return Role.model_validate_json(json.dumps(known[site]))
    except ValidationError as error:
        raise StoreError(
            f"what the SAE's cfg.json tells of {site} is damaged: {first_finding(error)}"
        ) from error


def config_of(model: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """Load the config of an SAE's model; arguments as of `load_model_config`.

    Raises:
        ConfigError: it cannot be found where the SAE says that it is.
    """
    try:
        return load_model_config(model, revision, trust_remote_code)
    except ConfigError as error:
        raise ConfigError(
            f"the config of the SAE's model names its sites; name it with --model. {error}"
        ) from error


def import_(path: Path | str, out: Path, model: str | None = None, format: str | None = None) -> None:
    """Write another tool's SAE as saemill saves its own.

    Args:
        path: a folder of any of the formats, or hf://user/repo/folder; a file where the format has one for
            each SAE.
        out: where to; a new or empty folder.
        model: hub id or folder of the model; its config decides which site the SAE's hook is.
        format: name of the format, where the files are of several.

    Raises:
        StoreError: no SAE there, or a damaged one.
        DiskError: the disk is full, or the folder may not be written to.
        ConfigError: the SAE cannot be represented, an output in use, or a hook that is no site of the model.
    """
    check_new(out)
    sae = Sae.load(path, format=format)
    provenance = sae.config.provenance
    hooks = {"site": provenance.get("hook_name")}
    hooks |= {"target_site": provenance.get("hook_name_out")} if sae.is_transcoder else {}
    if model and sae.config.predicted:
        sae = _with_sites(sae, model)
        provenance = sae.config.provenance
    elif model:
        provenance |= {"model": model} | {end: _site(name, model) for end, name in hooks.items() if name}
    with new(out) as partial:
        sae.save(partial)
    places = [place for end, name in hooks.items() if (place := provenance.get(end) or name)]
    where = " → ".join(places) or "a site that its files do not tell"
    say(f"{out}: {sae.config.described}, {where}")


def _with_sites(sae: Sae, model: str) -> Sae:
    """Name the sites of a cross-layer transcoder in place of the hooks that its files tell."""
    read, predicted = (
        tuple(replace(part, site=_site(part.site, model)) for part in parts)
        for parts in (sae.config.joined, sae.config.predicted)
    )
    places = {"site": JOINT.join(p.site for p in read), "target_site": JOINT.join(p.site for p in predicted)}
    provenance = sae.config.provenance | {"model": model} | places
    config = replace(sae.config, joined=read, predicted=predicted, provenance=provenance)
    return Sae.of(replace(sae.parts, config=config))


def _site(hook_name: str, model: str) -> str:
    model_type = load_model_config(model, None).model_type
    site = site_of(hook_name, model_type)
    if site is None:
        raise ConfigError(
            f"no site of {model_type} is TransformerLens' {hook_name}; import it without --model"
        )
    return site


def check_new(out: Path) -> None:
    """Refuse an output that holds anything but what a crash left of a file.

    Raises:
        ConfigError: it does.
    """
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - set(out.glob(durable.PARTIAL))):
        raise ConfigError(f"the output must be a new or an empty folder, got {out}; name another")


@contextmanager
def new(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to write to, which takes its place when the block ends well.

    A crash leaves the folder beside it, which the next call with the same `out` empties.
    """
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    with durable.writing(out), durable.exclusive(partial):
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
        for left in out.glob(durable.PARTIAL):
            left.unlink()
        partial.replace(out)
        durable.sync_folder(out.parent)
