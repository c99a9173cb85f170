"""saemill's assessment beside SAELens' evals, SAEBench's core, sparsify and dictionary_learning.

    python -m benchmarks.evaluate.others RUN TOKENS -o DIR [--rows 200] [--peers-python PATH]

RUN is a finished run; TOKENS a token store of text that training did not see. All evaluate the same rows:
saemill as `saemill assess` does, the others their exported SAEs, each by its own loader and evaluation, in
their own environment (`benchmarks.evaluate.evaluators`). Then each difference is taken apart: from saemill's
definitions to SAELens' one choice after another, all computed with saemill's model pass and SAE
(`benchmarks.evaluate.definitions`); what is left is rounding. The result is `DIR/results.md`, raw figures in
`DIR/results.json`.
"""

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evaluate import definitions
from benchmarks.evaluate.definitions import SPECIAL_REPLACED, STEPS, Figures, Site
from benchmarks.report import machine, table
from benchmarks.settings import OWN_OF_PEERS, ROOT, keep_settings
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import config
from saemill.common.models.model import LanguageModel
from saemill.common.sae import formats
from saemill.common.sae.formats.hooks import Hook, hook_of
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenStore

BATCH_ROWS, BATCH_TOKENS = 8, 4096
FIRST_ROWS = 2
"""On which hook and site are compared."""
OURS = {
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l2_ratio": "norm_ratio",
    "l0": "l0",
    "never_fired": "never_fired",
    "ce_loss_without_sae": "ce_clean",
    "ce_loss_with_sae": "ce_spliced",
    "delta_ce": "delta_ce",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "loss_recovered",
    "kl_div_with_sae": "kl",
}
"""SAELens' names, and saemill's; `delta_ce` is the difference of two of SAELens'."""
REPLACED = "saebench, special tokens replaced"
NEAREST = {"explained_variance_legacy": "explained_variance", "frac_variance_explained": "explained_variance"}
"""Figures that saemill has under another definition."""


@dataclass
class Run:
    """A finished run, and rows to evaluate it on."""

    folder: Path
    tokens: TokenStore
    model_name: str | None

    @cached_property
    def finished(self) -> dict[str, Any]:
        return json.loads((self.folder / "finished.json").read_text())

    @cached_property
    def store(self) -> ActivationStore:
        return ActivationStore(self.finished["acts"])

    @cached_property
    def model(self) -> LanguageModel:
        settings = self.store.settings
        revision = None if self.model_name else settings.revision
        return LanguageModel(
            self.model_name or settings.model,
            revision=revision,
            dtype=getattr(torch, settings.model_dtype),
            device=torch.device("cpu"),
            with_head=True,
        )

    @cached_property
    def saes(self) -> dict[str, Sae]:
        """Load the variants that `saemill assess` measures."""
        left_out = {*self.finished["diverged"], *self.finished["stopped"]}
        names = [name for name in self.finished["variants"] if name not in left_out]
        return {name: Sae.load(self.folder / name) for name in names}

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Open the sites of the run's SAEs, by name."""
        ids_RS = torch.from_numpy(self.tokens.rows(0, self.tokens.n_rows).astype(np.int64))
        mask = config.build(MaskConfig, self.finished["mask"], "mask")
        special_ids = self.tokens.tokenizer.special_ids
        sites = {}
        for site in self.hooks:
            stored = self.store.site(site).dtype
            sites[site] = Site(self.model, site, ids_RS, mask, special_ids, stored, BATCH_ROWS)
        return sites

    @cached_property
    def hooks(self) -> dict[str, Hook]:
        """Name the hooks of the sites in TransformerLens' terms, by site."""
        model_type, hooks = self.model.config.model_type, {}
        for sae in self.saes.values():
            site = sae.config.provenance["site"]
            hook = hook_of(site, model_type)
            if hook is None:
                raise SystemExit(f"TransformerLens has no hook for {site} of {model_type}")
            hooks[site] = hook
        return hooks

    def site_of(self, sae: Sae) -> Site:
        return self.sites[sae.config.provenance["site"]]


def check_unseen(run: Run) -> None:
    """Refuse documents that training saw: `saemill assess` leaves them out, the others cannot."""
    trained = run.store.tokens.documents
    known = trained["text_hash"].to_numpy()[~trained["held_out"].to_numpy(zero_copy_only=False)]
    if seen := int(np.isin(run.tokens.documents["text_hash"].to_numpy(), known).sum()):
        raise SystemExit(f"training saw {seen} documents of these rows; take rows of other text")


def own_assessment(run: Run, out: Path) -> dict[str, Any]:
    """Run `saemill assess` on the rows."""
    path = out / "assessment" / "final_assessment.json"
    if not path.exists():
        everything = {"max_tokens": run.tokens.n_tokens, "model_tokens": run.tokens.n_tokens}
        assess(
            AssessConfig(
                run=run.folder, tokens=run.tokens.path, model=run.model_name, out=path.parent,
                batch_size=BATCH_ROWS, device="cpu", n_latents=0, **everything,
            )
        )  # fmt: skip
    assessment: dict[str, Any] = json.loads(path.read_text())
    return assessment


def write_request(run: Run, out: Path) -> None:
    """Write what the others need: the rows, activations of them, and the SAEs in each one's format."""
    request: dict[str, Any] = {
        "model": run.model.name, "tokenizer": str((run.tokens.tokenizer_folder).absolute()),
        "special_ids": list(run.tokens.tokenizer.special_ids), "batch_rows": BATCH_ROWS,
        "batch_tokens": BATCH_TOKENS, "threads": torch.get_num_threads(), "hooks": {}, "variants": {},
    }  # fmt: skip
    np.save(out / "tokens.npy", next(iter(run.sites.values())).ids_RS.numpy())
    for name, site in run.sites.items():
        hook = run.hooks[name]
        first, counted = ((out / f"{what}-{name}.npy").absolute() for what in ("first", "x"))
        np.save(first, site.x_RSD[:FIRST_ROWS].numpy())
        np.save(counted, site.x(STEPS["saemill"]).numpy())
        request["hooks"][hook.name] = str(first)
        for variant, sae in run.saes.items():
            if run.site_of(sae) is site:
                folders = {
                    format: (out / "exported" / format / variant).absolute() for format in formats.NAMES
                }
                for format, folder in folders.items():
                    formats.save(sae.parts, format, folder, hook)
                request["variants"][variant] = {"x": str(counted)} | {
                    f: str(path) for f, path in folders.items()
                }
    (out / "asked.json").write_text(json.dumps(request))


@contextmanager
def evaluating(out: Path, python: Path) -> Iterator[None]:
    """Let the others evaluate in their own environment while the block runs, if they have not yet."""
    if (out / "about.json").exists():
        yield
        return
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [python, "-m", "benchmarks.evaluate.evaluators", out.absolute()]
    with (
        (out / "evaluators.log").open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise SystemExit(
            f"the evaluators ended with status {process.returncode}; see {out / 'evaluators.log'}"
        )


def by_definitions(run: Run, out: Path) -> dict[str, Any]:
    """Compute per variant the steps from saemill's to SAELens' figures, and what the others form from the
    same tensors."""
    path = out / "recomputed.json"
    recomputed: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if recomputed:
        return recomputed
    for site in run.sites.values():
        site_saes = {name: sae for name, sae in run.saes.items() if run.site_of(sae) is site}
        passes = site.run(site_saes)
        for name, sae in site_saes.items():
            steps = {
                step: definitions.reconstruction(site, sae, choices)
                | definitions.losses(site, passes, name, choices)
                for step, choices in STEPS.items()
            }
            others = definitions.by_rows(site, sae) | definitions.by_tokens(site, sae, BATCH_TOKENS)
            replaced = definitions.losses(site, passes, name, SPECIAL_REPLACED)
            others[REPLACED] = {
                key: replaced[key] for key in ("ce_loss_with_sae", "delta_ce", "kl_div_with_sae")
            }
            recomputed[name] = {"steps": steps, "others": others}
    path.write_text(json.dumps(recomputed, indent=1))
    return recomputed


def difference(a: float, b: float) -> float:
    """Compute the relative difference; of two zeros it is 0."""
    return abs(a - b) / max(abs(a), abs(b), 1e-12)


def in_saelens_terms(entry: dict[str, Any], d: int) -> dict[str, dict[str, float]]:
    """Return a variant's figures in `final_assessment.json` by SAELens' names and in its units."""
    figures = {}
    for name, own_name in OURS.items():
        figure = entry["metrics"][own_name]
        scale = d if name == "mse" else 1
        figures[name] = {key: scale * v for key, v in figure.items() if key != "reason" and v is not None}
    return figures


def number(value: float) -> str:
    return f"{value:,.4f}"


def rest(a: float, b: float) -> str:
    """Format the relative difference, as a cell."""
    return f"{difference(a, b):.0e}" if a != b else "0"


def with_interval(figure: dict[str, float]) -> str:
    interval = f" ({number(figure['lo'])}–{number(figure['hi'])})" if "lo" in figure else ""
    return number(figure["value"]) + interval


def comparison_table(own: dict[str, dict[str, float]], others: dict[str, Figures]) -> list[str]:
    """Render what each says of one variant."""
    tools = ("saelens", "saebench", REPLACED)
    rows = [
        [name, OURS[name], with_interval(figure)]
        + [number(others[tool][name]) if name in others[tool] else "" for tool in tools]
        for name, figure in own.items()
    ]
    head = ["their name", "saemill's", "saemill assess (95%)", "SAELens", "SAEBench core"]
    return table([*head, "SAEBench core, special tokens replaced"], rows)


def steps_table(steps: dict[str, Figures], saelens: Figures) -> list[str]:
    """Render the figures from saemill's definition to SAELens', one choice after another; empty where it
    changes nothing."""
    rows = []
    for name in OURS:
        values = [figures[name] for figures in steps.values()]
        cells = [number(values[0])]
        cells += [number(b) if difference(a, b) > 1e-9 else "" for a, b in pairwise(values)]
        rows.append([name, OURS[name], *cells, number(saelens[name]), rest(values[-1], saelens[name])])
    return table(["their name", "saemill's", *steps, "SAELens", "left (relative)"], rows)


def formulas_table(variant: dict[str, Any]) -> list[str]:
    """Render figures of other definitions: what each tool says, and its formula from saemill's tensors."""
    own = {name: number(figure["value"]) for name, figure in variant["ours"].items()}
    own["fvu"] = number(1 - variant["ours"]["explained_variance"]["value"])
    rows = []
    for tool, figures in variant["others"].items():
        for name, value in figures.items():
            reported = variant["theirs"][tool][name]
            nearest = own.get(NEAREST.get(name, name), "")
            rows.append([tool, name, nearest, number(reported), number(value), rest(value, reported)])
    head = ["tool", "figure", "saemill assess", "the tool", "its formula, saemill's tensors"]
    return table([*head, "left (relative)"], rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("tokens", type=Path, help="token store to evaluate on")
    parser.add_argument("--rows", type=int, default=200, help="of it, from its start")
    parser.add_argument("--model", help="if it is not where it was cached from")
    parser.add_argument("--peers-python", type=Path, default=OWN_OF_PEERS)
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.peers_python.exists():
        raise SystemExit(f"no peers at {args.peers_python}: make .venv-peers/ready")
    keep_settings(args)
    store = TokenStore(args.tokens)
    n_rows = min(args.rows, store.n_rows) // BATCH_ROWS * BATCH_ROWS
    if n_rows == 0:
        raise SystemExit(f"{args.tokens} has {store.n_rows} rows; a batch of {BATCH_ROWS} is needed")
    cut = args.out / "tokens"
    run = Run(args.run, TokenStore(cut) if cut.exists() else copy_rows(store, n_rows, cut), args.model)
    print("; ".join(f"{site} is {hook.name}" for site, hook in run.hooks.items()), flush=True)
    check_unseen(run)
    write_request(run, args.out)
    with evaluating(args.out, args.peers_python):
        assessment = own_assessment(run, args.out)
        recomputed = by_definitions(run, args.out)
    raw: dict[str, Any] = json.loads((args.out / "about.json").read_text())
    raw |= {"data": assessment["data"], "variants": {}}
    for entry in assessment["variants"]:
        if (name := entry["name"]) in run.saes:
            own = in_saelens_terms(entry, run.saes[name].config.d_in)
            others = json.loads((args.out / "theirs" / f"{name}.json").read_text())
            raw["variants"][name] = {"ours": own, "theirs": others} | recomputed[name]
    (args.out / "results.json").write_text(json.dumps(raw, indent=1))
    lines = report(run, raw)
    (args.out / "results.md").write_text("\n".join(lines))
    print("\n".join(lines))


def report(run: Run, raw: dict[str, Any]) -> list[str]:
    """Render all tables."""
    versions = {name: version(name) for name in ("saemill", "transformers")} | raw["versions"]
    data, rows = raw["data"], run.tokens
    errors = ", ".join(f"{hook} {error:.0e}" for hook, error in raw["hook_error"].items())
    lines = [machine(versions), ""]
    lines += [
        f"{rows.n_rows:,} rows of {rows.ctx_len}: {data['n_tokens']:,} tokens of {data['n_documents']:,} "
        f"documents count, {data['n_tokens_with_losses']:,} of them predict. Activations at TransformerLens' "
        f"hook and at saemill's site differ by at most (over their root mean square): {errors}.",
        "",
    ]
    for name, variant in raw["variants"].items():
        others = variant["theirs"]
        own = {key: figure["value"] for key, figure in variant["ours"].items()}
        apart = max(difference(own[key], value) for key, value in variant["steps"]["saemill"].items())
        same = others["saelens"].keys() & others["saebench"].keys() - variant["others"]["saebench"].keys()
        between = max(difference(others["saelens"][key], others["saebench"][key]) for key in same)
        lines += [f"### {name}", "", *comparison_table(variant["ours"], others)]
        lines += steps_table(variant["steps"], others["saelens"])
        lines += [f"The first step and `saemill assess` differ by at most {apart:.0e} (relative).", ""]
        lines += formulas_table(variant)
        lines += [f"SAEBench's other figures differ from SAELens' by at most {between:.0e} (relative).", ""]
    return lines


if __name__ == "__main__":
    main()
