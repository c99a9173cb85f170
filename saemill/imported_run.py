"""`saemill import SAE… --acts STORE`: SAEs that were trained elsewhere, as a run on cached activations.

The folder holds what a finished run holds, so that whatever takes a run takes it: `assess`, `compare`,
`latent`, `view`, `explain`. Each SAE has the site of the store that it reads, by its own
file or as it is named here. A crosscoder of two models reads those of two stores.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saemill.common import durable, records
from saemill.common.errors import ConfigError
from saemill.common.hub import SCHEME
from saemill.common.log import counted, say
from saemill.common.sae.formats import seal
from saemill.common.sae.formats.hooks import denotes, hook_of, site_of
from saemill.common.sae.parts import Joined
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.joined import model_of
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_names import BESIDE, JOINT, is_beside, parts_of
from saemill.common.stores.tokens import TokenStore
from saemill.convert import check_new, config_of, new


def import_run(
    paths: Sequence[str],
    acts: Path | str,
    out: Path,
    *,
    with_acts: Path | str | None = None,
    model: str | None = None,
    format: str | None = None,
    site: str | None = None,
    target_site: str | None = None,
) -> None:
    """Write SAEs as a run on a store, under the names of their folders.

    Args:
        paths: folders or files of any format, or hf://user/repo/folder.
        acts: the activation store.
        out: where to; a new or empty folder.
        with_acts: the store of the second model, of crosscoders of two.
        model: hub id or folder of the model, if not where it was cached from; its config tells the site of
            a hook.
        format: name of the format, where files are of several.
        site: site of the store that all of them read; None for what their files tell.
        target_site: site that all of them predict, of transcoders.

    Raises:
        StoreError: no SAE there, or a damaged one; or the store lacks its site.
        ConfigError: an SAE that cannot be represented, or does not fit the store; an output in use.
        DiskError: the disk is full, or the folder may not be written to.
    """
    check_new(out)
    store = ActivationStore(acts, with_acts)
    store.check_finished()
    saes: dict[str, Sae] = {}
    for path, name in zip(paths, names_of(paths), strict=True):
        runs.check_variant_name(name)
        try:
            sae = Sae.load(path, format=format)
            saes[name] = _placed(sae, store, model, {"site": site, "target_site": target_site})
        except ConfigError as error:
            raise ConfigError(str(error) if path in str(error) else f"{path}: {error}") from error
    if with_acts is not None and not any(_is_of_two(str(sae.site)) for sae in saes.values()):
        raise ConfigError(f"with_acts has no effect: no SAE joins a site of {with_acts}; leave it out")
    mask = _one_mask({name: _mask(sae, store) for name, sae in saes.items()})
    with new(out) as partial:
        for name, sae in saes.items():
            sae.save(partial / name)
        cfgs = {name: seal.checksum(partial / name) for name in saes}
        records.write(
            partial / runs.FINISHED, _record(dict(zip(saes, paths, strict=True)), cfgs, store, mask)
        )
    for name, sae in saes.items():
        say(f"{out / name}: {sae.config.described}, {sae.site}{_of_another_model(sae, store)}")
    say(f"{out}: {counted(len(saes), 'SAE')} as a run on {store.named}; `saemill assess {out}` measures them")


def names_of(paths: Sequence[str]) -> list[str]:
    """Name SAEs by the ends of their paths, as short as tells them apart.

    Raises:
        ConfigError: one is there twice.
    """
    places = [
        path.removeprefix(SCHEME).rstrip("/").split("/")
        if path.startswith(SCHEME)
        else [part for part in _without_suffix(Path(path).absolute()).parts if part != "/"]
        for path in paths
    ]
    for n in range(1, max(map(len, places)) + 1):
        names = ["-".join(place[-n:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"each SAE must be named once, got {', '.join(paths)}")


def _without_suffix(path: Path) -> Path:
    """Leave out what a file's name ends in; a folder may be called layers.2."""
    return path.with_suffix("") if path.is_file() else path


def _placed(sae: Sae, store: ActivationStore, model: str | None, given: dict[str, str | None]) -> Sae:
    """Give an SAE the sites of a store that it reads and predicts.

    Raises:
        ConfigError: they are not known, or of other widths.
        StoreError: the store does not have them.
    """
    origin, settings = sae.config.provenance, store.settings
    ends = {"site": sae.config.d_in}
    ends |= {"target_site": sae.config.d_out or 0} if sae.is_transcoder else {}
    if given["target_site"] is not None and not sae.is_transcoder:
        raise ConfigError("target_site is what a transcoder predicts, and it is none; leave it out")
    hooks = {"site": origin.get("hook_name"), "target_site": origin.get("hook_name_out")}
    joined = {"site": sae.config.joined, "target_site": sae.config.predicted}
    found = {end: given[end] or _site(store, model, origin.get(end), hooks[end], joined[end]) for end in ends}
    if store.beside is None and (of_two := [name for name in found.values() if name and _is_of_two(name)]):
        raise ConfigError(
            f"it joins sites of two stores, {of_two[0]}; name the second model's with --with-acts"
        )
    for end, width in ends.items():
        if (name := found[end]) is None:
            raise ConfigError(
                f"its files do not tell the {'site that it reads' if end == 'site' else 'site it predicts'}; "
                f"name one of the store's with --{end.replace('_', '-')}: {', '.join(store.sites)}"
            )
        if (its := store.site(name).width) != width:
            raise ConfigError(f"it is {width:,} wide, and {name} of {store.named} {its:,}; name another site")
    known: dict[str, Any] = {
        **found,
        "model": settings.model,
        "revision": settings.revision,
        "acts_fingerprint": store.fingerprint,
        **({} if store.beside is None else {"with": model_of(store.beside)}),
        "diverged_at_step": None,
        "trained_on_model": origin.get("model"),
    }
    config = replace(sae.config, provenance=origin | known)
    config = replace(config, joined=_renamed(config.joined, found["site"]))
    config = replace(config, predicted=_renamed(config.predicted, found.get("target_site")))
    return Sae.of(replace(sae.parts, config=config))


def _is_of_two(site: str) -> bool:
    """Tell whether a name joins a site of a second store."""
    return any(is_beside(part) for part in parts_of(site))


def _renamed(parts: tuple[Joined, ...], site: str | None) -> tuple[Joined, ...]:
    """Give the parts of a joined site the names that the store has."""
    if not parts:
        return ()
    names = parts_of(site or "")
    return tuple(replace(part, site=name) for part, name in zip(parts, names, strict=True))


def _site(
    store: ActivationStore, model: str | None, site: str | None, hook: str | None, joined: Sequence[Joined]
) -> str | None:
    """Find what the store calls the site that an SAE's files tell, by its name or by its hook.

    Raises:
        ConfigError: the model has no site of the hook, or the store holds something else there.
    """
    if joined:
        return JOINT.join(_site(store, model, part.site, None, ()) or part.site for part in joined)
    if site is not None and is_beside(site) and store.beside is not None:
        return f"{BESIDE}{_site(store.beside, None, site.removeprefix(BESIDE), None, ())}"
    if site in store.sites or (site is None and hook is None):
        return site
    name = model or store.settings.model
    if name is None:  # embeddings: no model has a hook of theirs
        return site
    config = config_of(name, None if model else store.settings.revision)
    found = site_of(str(hook or site), config.model_type)
    if found is None:
        if site is None:
            raise ConfigError(
                f"no site of {config.model_type} is TransformerLens' {hook}; name one with --site"
            )
        return site
    its_hook, role = hook_of(found, config.model_type), store.site(found).role
    if its_hook is not None and not denotes(its_hook, role):
        assert role is not None
        raise ConfigError(f"{hook} is what is added as it is, and {found} is {role.described}")
    return found


def _mask(sae: Sae, store: ActivationStore) -> MaskConfig:
    """Read which positions training left out; the store's mask where the SAE's files do not tell."""
    left_out, of_store = sae.config.provenance.get("left_out"), store.mask
    if not isinstance(left_out, dict) or not isinstance(store.text, TokenStore):
        return of_store
    roles = tuple(sae.config.provenance.get("trained_on") or ())
    ids, tokenizer = sorted(left_out["token_ids"]), store.tokens.tokenizer
    first = int(left_out["first_positions"])
    if ids == of_store.ids(tokenizer.special_ids):
        return replace(of_store, first_positions=first, roles=roles)
    mask = MaskConfig(special_tokens=False, first_positions=first, token_ids=tuple(ids), roles=roles)
    mask.check(tokenizer.vocab_size, store.ctx_len, store.tokens.manifest.roles)
    return mask


def _one_mask(masks: dict[str, MaskConfig]) -> MaskConfig:
    """Refuse SAEs that were trained on other positions than the rest: figures on different ones do not
    compare."""
    (first, mask), *others = masks.items()
    for name, other in others:
        if other != mask:
            raise ConfigError(
                f"{first} and {name} were trained on other positions ({mask} and {other}), so that their "
                "figures do not compare; import them into folders of their own"
            )
    return mask


def _of_another_model(sae: Sae, store: ActivationStore) -> str:
    """Say which model an SAE's file tells of, where the store's has another name."""
    told, own = sae.config.provenance.get("trained_on_model"), store.settings.model
    return f"; its file says model {told}, the store's is {own}" if told not in (None, own) else ""


def _record(
    addresses: dict[str, str], cfgs: dict[str, str], store: ActivationStore, mask: MaskConfig
) -> runs.Finished:
    """Describe the run that they make up."""
    return runs.Finished(
        run=durable.hash_json([cfgs, store.fingerprint]),
        variants=tuple(cfgs),
        cfgs=cfgs,
        acts=store.place,
        with_acts=None if store.beside is None else store.beside.place,
        steps=0,
        tokens=0,
        seconds=0.0,
        peak_rss_bytes=0,
        diverged={},
        stopped={},
        mask=mask,
        imported=addresses,
        files=(),
    )
