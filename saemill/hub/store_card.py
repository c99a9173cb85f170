"""README.md of a store's repository: what is in it, and how it is read."""

from pathlib import PurePath

from huggingface_hub import DatasetCardData

from saemill.common.log import counted
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.passages import PassageManifest, PassageStore
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_records import StoreSettings
from saemill.common.stores.tokens import TokenManifest, TokenStore
from saemill.hub.card import code, front_matter, rows
from saemill.hub.names import Names

SITE_HEAD = ["site", "shape", "stored as", "MiB", "mean squared norm"]


def tokens_card(repo: str, store: TokenStore, names: Names) -> str:
    """Render the card of a token store.

    Args:
        repo: where it will be: `user/repo`, or `user/repo@branch`.
        store: what is uploaded.
        names: what stands for this machine's paths.
    """
    manifest = names.record(store.manifest)
    source = manifest.source.name
    sections = [
        _front_matter("tokens"),
        f"# Tokens of {PurePath(source).name}",
        f"{counted(store.n_rows, 'full row')} of {store.ctx_len} token ids, packed by saemill "
        f"{manifest.versions.get('saemill', '')}, with the documents they come from.",
        rows([["", ""], *_text_lines(store, manifest)]),
        "## Read",
        code("", f"saemill pull datasets/{repo} -o tokens"),
        code(
            "python",
            "from saemill import TokenStore\n\n"
            'store = TokenStore("tokens")\n'
            f"ids = store.rows(0, 16)  # [16, {store.ctx_len}]\n"
            "held_out = store.held_out_R  # bool [rows]: never trained on",
        ),
    ]
    return "\n\n".join(sections) + "\n"


def activations_card(repo: str, store: ActivationStore, names: Names) -> str:
    """Render the card of an activation store; arguments as of `tokens_card`."""
    settings, text = names.record(store.settings), store.text
    if isinstance(text, TokenStore):
        title, what = _of_a_model(settings)
        lines = _text_lines(text, names.record(text.manifest))
        read = f"store.tokens.rows(0, 16)  # [16, {store.ctx_len}]"
    else:
        title, what = _of_passages(settings, names.in_text(text.manifest.source.name))
        lines, read = _passage_lines(text, names.record(text.manifest)), "store.text.texts(0, 16)"
    sites = [store.array(name) for name in store.sites]
    shards = ["shards", f"{store.n_shards:,} of {store.shard_tokens:,} {text.unit}s per site"]
    first, n = sites[0], min(store.n_tokens, 1024)
    sections = [
        _front_matter("activations"),
        f"# {title}",
        what,
        rows([SITE_HEAD, *(_site_line(site, settings.stored_as) for site in sites)]),
        rows([["", ""], *_model_lines(settings), *lines, shards]),
        "## Read",
        code("", f"saemill pull datasets/{repo} -o acts"),
        code(
            "python",
            "from saemill import ActivationStore\n\n"
            'store = ActivationStore("acts")\n'
            f'x = store.read("{first.name}", 0, {n})  # [{n}, {first.width}], in the order of the text\n'
            f"text = {read}",
        ),
        "`saemill train acts` trains on it. It is Zarr v3, which other readers take as well: rows lie "
        "shuffled within each shard, by a permutation that saemill computes, bf16 is kept as uint16, and of "
        "int8 there are codes and steps, with mean and scale in the site's manifest.",
    ]
    return "\n\n".join(sections) + "\n"


def _of_a_model(settings: StoreSettings) -> tuple[str, str]:
    """Write the title of a language model's activations, and what they are."""
    version = settings.versions.get("saemill", "")
    return (
        f"Activations of {PurePath(str(settings.model)).name}",
        f"Activations of `{settings.model}`, cached by saemill {version}, and the tokens that they belong "
        "to. A site is the output of that module of the base model (`AutoModel`), or with :in its input.",
    )


def _of_passages(settings: StoreSettings, source: str) -> tuple[str, str]:
    """Write the title of embeddings, and what they are."""
    by = f"by `{settings.model}`, " if settings.model else ""
    version = settings.versions.get("saemill", "")
    return (
        f"Embeddings of {PurePath(source).name}",
        f"Embeddings {by}with their texts or ids, stored by saemill {version}.",
    )


def _front_matter(kind: str) -> str:
    """Render the metadata. Without `viewer: false` the hub would show the lists of documents as if they were
    the data."""
    return front_matter(DatasetCardData(tags=["saemill", "interpretability", kind], viewer=False))


def _site_line(site: SiteArray, dtype: str) -> list[str]:
    return [
        f"`{site.name}`",
        f"[{site.store.n_tokens:,}, {site.width:,}]",
        dtype,
        f"{site.n_bytes / 2**20:,.1f}",
        f"{site.statistics.mean_squared_norm:.4g}",
    ]


def _model_lines(settings: StoreSettings) -> list[list[str]]:
    """List the model and the type that it computed in, as far as there are."""
    revision = f" at `{settings.revision}`" if settings.revision else ""
    lines = [["model", f"`{settings.model}`{revision}"]] if settings.model else []
    return lines + ([["computed in", settings.model_dtype]] if settings.model_dtype else [])


def _passage_lines(store: PassageStore, manifest: PassageManifest) -> list[list[str]]:
    return [
        ["passages", f"{store.n_rows:,}, of `{manifest.source.name}`"],
        ["held out", f"{manifest.n_held_out_rows:,}, by a hash of their {manifest.hashed}"],
    ]


def _text_lines(store: TokenStore, manifest: TokenManifest) -> list[list[str]]:
    return [
        ["text", f"`{manifest.source.name}`, {counted(manifest.n_documents, 'document')}"],
        ["tokens", f"{store.n_tokens:,}: {counted(store.n_rows, 'row')} of {store.ctx_len}"],
        ["held out", f"{manifest.n_held_out_rows:,} rows, by a hash of their documents' text"],
        ["tokenizer", f"`{manifest.tokenizer.name}`, {store.tokenizer.vocab_size:,} ids"],
    ]
