"""README.md of a run's repository: what the SAEs are, how good, how to load them, how they were made."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCardData, RepoCard

from saemill.assess.sums import number
from saemill.assess.table import CONTROLS, bests, cuts, described, interval
from saemill.common.hub import is_id
from saemill.common.log import counted, duration, printable
from saemill.common.stores import runs
from saemill.common.stores.site_names import abridged
from saemill.hub import kinds

ORDER = ["library_name", "tags", "base_model", "datasets"]
"""Fields that come first."""
TAGS = ["sparse-autoencoder", "sae"]
COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "delta_ce": "ΔCE, nats",
    "loss_recovered": "loss recovered",
    "dead_fraction": "dead",
}


def model_card(
    repo: str,
    saes: Mapping[str, Mapping[str, Any]],
    finished: Mapping[str, Any],
    identity: Mapping[str, Any],
    assessment: Mapping[str, Any] | None,
) -> str:
    """Render the card, as Markdown with YAML before it.

    Args:
        repo: where it will be: `user/repo`, or `user/repo@branch`.
        saes: the `cfg.json` of each variant, by name.
        finished, identity: the run's `finished.json` and `identity.json`.
        assessment: its `final_assessment.json`, if there is one.
    """
    provenance = next(iter(saes.values()))["saemill"]
    places = list(dict.fromkeys(_place(cfg) for cfg in saes.values()))
    sections = [
        front_matter(
            ModelCardData(
                library_name="saemill",
                tags=[*TAGS, *kinds.tags(saes), "interpretability"],
                base_model=provenance["model"] if is_id(provenance["model"] or "") else None,
                datasets=[provenance["dataset"]] if is_id(provenance["dataset"]) else None,
            )
        ),
        f"# {kinds.title(saes)} of {words(_short(provenance['model'] or provenance['dataset']))}",
        f"{kinds.number(saes)} of {_what(saes, places)} {kinds.formula(saes)}.",
        "## Variants",
        *_variants(saes, finished, assessment),
        *(_how_measured(assessment) if assessment else ()),
        "## Load",
        _load(repo, best := _best(saes, finished, assessment), saes[best]),
        "## Recipe",
        _recipe(saes, finished, provenance),
        "The settings that decide the result, as `saemill train` takes them (also in `config.yaml`); what is "
        "not listed is saemill's default:",
        code("yaml", yaml.safe_dump({"train": _without_unset(identity)}, sort_keys=False)),
    ]
    return "\n\n".join(sections) + "\n"


def _within(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render the table of the SAEs within the SAEs; nothing where there are none."""
    titles, *lines = cuts(entries) or [[]]
    if not lines:
        return []
    about = (
        "The first latents of a Matryoshka SAE are an SAE themselves, `sae.prefix(n)`; one that was trained "
        "for several k is used at another by `sae.at_k(k)`; an SAE of several sites has figures at each:"
    )
    return [about, rows([titles, *([span(name), *cells] for name, *cells in lines)])]


def _place(cfg: Mapping[str, Any]) -> str:
    """Write the site of an SAE as code, of a transcoder both of its sites."""
    origin = cfg["saemill"]
    ends = map(abridged, filter(None, (origin["site"], origin.get("target_site"))))
    return " → ".join(map(span, ends))


def _what(saes: Mapping[str, Mapping[str, Any]], places: Sequence[str]) -> str:
    """Say what the SAEs were trained on, and what they take."""
    provenance = next(iter(saes.values()))["saemill"]
    by = f"trained by saemill {provenance['versions']['saemill']} on {provenance['tokens_trained']:,}"
    if "normalized" in provenance:
        form = "of unit length" if provenance["normalized"] else "as they were stored"
        who = f" by {span(provenance['model'])}" if provenance["model"] else ""
        return (
            f"embeddings{who}, {by} passages of {span(provenance['dataset'])}. The SAEs take vectors {form}:"
        )
    return (
        f"{span(provenance['model'])} at {', '.join(places)}, {by} tokens of {span(provenance['dataset'])}. "
        "A site is the output of that module of the base model (`AutoModel`), with :in its input; "
        f"{kinds.takes(saes)}:"
    )


def front_matter(data: CardData) -> str:
    """Render the card's metadata as YAML; a field that is None is left out."""
    return f"---\n{data.to_yaml(original_order=ORDER)}\n---"


def keep_metadata(card: str, metadata: Mapping[str, Any]) -> str:
    """Add to a card the fields of another's metadata that it has not itself."""
    repo_card = RepoCard(card)
    for name, value in metadata.items():
        if name not in repo_card.data:
            repo_card.data[name] = value
    return str(repo_card)


def code(language: str, text: str) -> str:
    """Render a block of code, whatever is in it."""
    text = printable(text.rstrip())
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def span(name: str) -> str:
    """Render a name as code within a line, whatever is in it."""
    text = _one_line(name)
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def words(name: str) -> str:
    """Render a name within a line as plain words: none of it is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>&|~])", r"\\\1", _one_line(name))


def _one_line(name: str) -> str:
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def _longest_run(text: str) -> int:
    """Count the backticks of the longest run of them."""
    return max(map(len, re.findall("`+", text)), default=0)


def rows(lines: Sequence[Sequence[str]]) -> str:
    """Render a table; the first line is its head. A bar in a cell does not end it."""
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest))


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _variants(
    saes: Mapping[str, Mapping[str, Any]], finished: Mapping[str, Any], assessment: Mapping[str, Any] | None
) -> list[str]:
    """Render the table of all variants, best first where they were assessed, and that of the SAEs within."""
    several = kinds.architectures(saes) != ["topk"]
    head = ["variant", "site", *(["architecture"] if several else []), "k", "latents"]
    shapes = {
        name: [
            _place(cfg),
            *([kinds.architecture(cfg)] if several else []),
            str(cfg.get("k", "–")),
            f"{cfg['num_latents']:,}",
        ]
        for name, cfg in saes.items()
    }
    if assessment is None:
        lines = [[span(name), *shape, _state(name, finished)] for name, shape in shapes.items()]
        note = "**Not assessed.** Nothing is known here of how well they reconstruct: `saemill assess`."
        return [note, rows([[*head, "state"], *lines])]
    every = [*assessment["variants"], *assessment["controls"]]  # trained ones with a frozen decoder too
    entries = [entry for entry in every if entry["name"] in saes]
    columns = {c: t for c, t in COLUMNS.items() if any(e["metrics"][c]["value"] is not None for e in entries)}
    lines = [
        [span(entry["name"]), *shapes[entry["name"]], *_figures(entry["metrics"], columns), entry["verdict"]]
        for entry in entries
    ]
    table = rows([[*head, *columns.values(), "verdict"], *lines])
    return [
        *_picture(assessment),
        table,
        *_reasons(entries, columns),
        *_controls(saes, assessment, columns),
        *_best_elsewhere(saes, assessment),
        *_within(entries),
    ]


def _picture(assessment: Mapping[str, Any]) -> list[str]:
    """Show the picture that is uploaded with the assessment; nothing where there is none."""
    if all(file["path"] != runs.PARETO for file in assessment["files"]):
        return []
    return [
        f"![Error of each SAE against its L0, beside controls]({runs.PARETO})",
        "Lower is better. Bars are 95% intervals, hollow marks controls; a ring is around the first of the "
        "table, and of each other site.",
    ]


def _controls(saes: Iterable[str], assessment: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Render the table of the controls that are not uploaded; nothing where there are none."""
    controls = [entry for entry in assessment["controls"] if entry["name"] not in set(saes)]
    if not controls:
        return []
    lines = [[span(entry["name"]), *_figures(entry["metrics"], columns)] for entry in controls]
    what = dict.fromkeys(CONTROLS[entry["control"]] for entry in controls)
    about = f"For comparison, on the same tokens, controls: {', '.join(what)}."
    return [about, rows([["control", *columns.values()], *lines])]


def _best_elsewhere(saes: Iterable[str], assessment: Mapping[str, Any]) -> list[str]:
    """Quote the best variant at each site on the documents that it was not chosen on, where several were
    compared."""
    each = bests(assessment)
    if len(assessment["variants"]) == 1:
        return []
    where = {best["variant"]: f"at {span(best['site'])}" if len(each) > 1 else "of them" for best in each}
    return [
        f"First {where[best['variant']]}: {span(best['variant'])}, {described(best, assessment)}."
        for best in each
        if best["variant"] in saes
    ]


def _reasons(entries: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Say why figures of the table are missing."""
    reasons = dict.fromkeys(
        f"{title}: {entry['metrics'][name]['reason']}."
        for entry in entries
        for name, title in columns.items()
        if entry["metrics"][name]["value"] is None and not entry["not_measured"]
    )
    return [f"No {line}" for line in reasons]


def _state(name: str, finished: Mapping[str, Any]) -> str:
    if name in finished["diverged"]:
        return f"diverged at step {finished['diverged'][name]:,}"
    stopped = finished["stopped"].get(name)
    return f"stopped by halving at step {stopped['step']:,}" if stopped else "trained to the end"


def _figures(metrics: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """Format values with their intervals, where they have one."""
    intervals = {name: interval(metrics[name]) for name in columns}
    return [number(metrics[n]) + (f" ({intervals[n]})" if intervals[n] else "") for n in columns]


def _how_measured(assessment: Mapping[str, Any]) -> list[str]:
    data, limits = assessment["data"], assessment["thresholds"]
    with_losses, unit = data["n_tokens_with_losses"], data["unit"]
    return [
        f"Measured on {data['n_tokens']:,} {unit}s of {counted(data['n_documents'], data['document'])}: "
        f"{data['chosen']}. "
        + (
            f"Losses on {with_losses:,} of them. "
            if with_losses
            else "The model's losses were not measured. "
        )
        + f"In brackets 95% intervals over {data['document']}s.",
        "FVU is the share of variance that is not reconstructed; ΔCE what splicing the SAE into the model "
        "costs it; loss recovered compares that with zeros in place of the activations; dead are latents "
        f"active on fewer than {data['dead_percentage_threshold']:.2%} of the {unit}s. An SAE passes "
        "if FVU and ΔCE are surely below 0.9 of a random dictionary's and below PCA's of the same k, at most "
        f"{limits['max_dead_fraction']:.0%} of its latents are dead, and dense ones are not what fires most. "
        "More is in `report.html` and `final_assessment.json`.",
    ]


def _best(
    saes: Mapping[str, Mapping[str, Any]], finished: Mapping[str, Any], assessment: Mapping[str, Any] | None
) -> str:
    """Choose the variant that the examples load: the best, or one that was trained to the end."""
    order: list[str] = [entry["name"] for entry in assessment["variants"]] if assessment else []
    order += [name for name in saes if name not in finished["diverged"] | finished["stopped"]]
    return next(name for name in [*order, *saes] if name in saes)


def _sparsify(repo: str, variant: str) -> list[str]:
    """Show how sparsify reads one of the SAEs."""
    from_hub = f"load_from_hub({_quoted(repo)}, hookpoint={_quoted(variant)})"
    if "@" in repo:  # it knows no branches
        from_hub = f"load_from_disk({_quoted(f'run/{variant}')})  # after `saemill pull {repo} -o run`"
    return [
        "With sparsify, which has the same layout:",
        code("python", f"from sparsify import SparseCoder\n\nsae = SparseCoder.{from_hub}"),
    ]


def _load(repo: str, variant: str, cfg: Mapping[str, Any]) -> str:
    """Show how each tool that has SAEs of the kind reads one."""
    address, joined = f"hf://{repo}/{variant}", cfg.get("joined", ())
    sites = " and ".join(span(part["site"]) for part in joined)
    side_by_side = f", those of {sites} side by side" if joined else ""
    tools = kinds.tools(cfg)
    decode = "reconstruction = sae.decode(top_acts, top_indices)  # [T, D]"
    if kinds.is_transcoder(cfg):
        decode = "prediction = sae.decode(top_acts, top_indices, x)  # [T, E]"
    exported = [tool for tool in tools if tool in EXAMPLES]
    return "\n\n".join(
        [
            f"`x` holds activations [T, D]{side_by_side}, fp32. With saemill:",
            code(
                "python",
                "from saemill import Sae\n\n"
                f"sae = Sae.load({_quoted(address)})\n"
                "top_acts, top_indices = sae.encode(x)  # [T, k] each\n" + decode,
            ),
            *(_sparsify(repo, variant) if "sparsify" in tools else ()),
            *(_exports(address, exported) if exported else ()),
            f"`saemill pull {repo} -o run` fetches the whole run.",
        ]
    )


EXAMPLES = {
    "saelens": 'from sae_lens import SAE\n\nsae = SAE.load_from_disk("for-saelens")',
    "dictionary_learning": "from dictionary_learning.utils import load_dictionary\n\n"
    'sae, config = load_dictionary("for-dictionary-learning", device="cpu")',
}
"""Code that loads an exported SAE, by the tool."""


def _exports(address: str, tools: Sequence[str]) -> list[str]:
    """Show how other tools read an SAE that was exported for them."""
    exports = (
        f"saemill export {shlex.quote(address)} --format {tool} -o for-{tool.replace('_', '-')}"
        for tool in tools
    )
    named = {"saelens": "SAELens"}
    return [
        f"With {' and '.join(named.get(tool, tool) for tool in tools)}, after an export:",
        code("", "\n".join(exports)),
        *(code("python", EXAMPLES[tool]) for tool in tools),
    ]


def _quoted(text: str) -> str:
    """Quote a name as Python and JSON write it."""
    return json.dumps(text, ensure_ascii=False)


def _recipe(
    saes: Mapping[str, Mapping[str, Any]], finished: Mapping[str, Any], provenance: Mapping[str, Any]
) -> str:
    rates = sorted({cfg["saemill"]["variant"]["lr"] for cfg in saes.values()})
    mask = finished["mask"]
    masked = ["special tokens"] if mask["special_tokens"] else []
    if mask["first_positions"]:
        n = mask["first_positions"]
        masked.append(f"the first {f'{n} positions' if n > 1 else 'position'} of each row")
    masked += [f"token {token}" for token in mask["token_ids"]]
    if n_long := finished["n_long_tokens"]:
        masked.append(f"{n_long:,} of more than {finished['norm_over_median']:g} times the median norm")
    revision = f" at revision {span(provenance['revision'])}" if provenance["revision"] else ""
    row_length = f", rows of {provenance['ctx_len']} tokens" if "ctx_len" in provenance else ""
    lines = [
        *([["model", f"{span(provenance['model'])}{revision}"]] if provenance["model"] else []),
        ["text", f"{span(provenance['dataset'])}{row_length}"],
        ["left out of training", ", ".join(masked) or "nothing"],
        [
            "passages" if "normalized" in provenance else "tokens",
            f"{finished['tokens']:,} in {counted(finished['steps'], 'step')}",
        ],
        ["peak learning rate", f"{rates[0]:.3g}" + (f" to {rates[-1]:.3g}" if len(rates) > 1 else "")],
        ["time", f"{duration(finished['seconds'])} for the {counted(len(finished['variants']), 'variant')}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())],
    ]
    return rows([["", ""], *lines])


def _without_unset(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that say something."""
    return {
        key: value
        for key, value in identity.items()
        if value not in (None, [], ()) and key != "acts_fingerprint"
    }
