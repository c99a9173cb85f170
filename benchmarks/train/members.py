"""Every architecture beside the peers that have it, and all of them at once: speed and memory.

    python -m benchmarks.train.members --latents 6144 --l0 32 --threads 1,2 -o DIR

Runs are those of `benchmarks.train.peers`: each a process of its own through its package's own training loop,
all reading the same rows, in turns. All have the same F, D and T. How many latents are active is the same
too: with a k it is k; where a penalty decides, each SAE starts with biases (JumpReLU: thresholds) that `--l0`
latents per token pass, and a small rate keeps it there over the few steps. The last column has the L0 on
held-out rows after the last step. It matters to saemill alone: the peers compute those architectures densely,
whatever L0 is, and saemill does where more than a 12th of the latents are active.

A mixed sweep follows: one SAE of each architecture over one stream. dictionary_learning and SAELens step all
on each batch in one call; sparsify has TopK alone and does not take part. Reported is variant-tokens/s.
Runs that are finished in DIR are not run again. The result is `DIR/results.md`, raw figures in
`DIR/results.json`.
"""

import argparse
import json
from typing import Any

from benchmarks.report import table
from benchmarks.settings import keep_settings
from benchmarks.train import contest, rows, sweep
from benchmarks.train.contest import MEMBERS, Entry

MIXED = "mixed"
"""Name of the sweep over all members, beside theirs."""
L1 = "0.05"
"""Weight of the penalty of ReLU and Gated: at a small rate it decides nothing."""

Rounds = list[dict[str, Any]]
Results = dict[str, dict[int, dict[str, Rounds]]]
"""By member, number of threads and contestant."""


def goals(args: argparse.Namespace, member: str) -> list[sweep.Goal]:
    """List the SAEs of a member, or of the mixed sweep."""
    members = args.members if member == MIXED else [member]
    return [(each, L1 if each in ("relu", "gated") else str(args.l0), args.lr) for each in members]


def entrants(entries: dict[str, Entry], args: argparse.Namespace, member: str) -> dict[str, Entry]:
    """Choose the contestants that have a member, or all members."""
    needed = set(args.members if member == MIXED else [member])
    return {name: entry for name, entry in entries.items() if needed <= set(entry.members)}


def measure(args: argparse.Namespace, entries: dict[str, Entry]) -> Results:
    """Run a few steps of each contestant for each member, interleaved."""
    subjects = [*args.members, *([MIXED] if len(args.members) > 1 else [])]
    threads = args.threads
    results: Results = {subject: {n: {} for n in threads} for subject in subjects}
    for turn in range(args.rounds):
        for n in threads:
            for subject in subjects:
                for name, entry in entrants(entries, args, subject).items():
                    further = {"threads": n, "start-l0": args.l0, "eval-steps": args.steps}
                    run = f"{subject}-{name}-t{n}-r{turn}"
                    found = sweep.one_round(args, entry, run, goals(args, subject), **further)
                    results[subject][n].setdefault(name, []).append(found)
    return results


def subject_table(
    args: argparse.Namespace, subject: str, by_threads: dict[int, dict[str, Rounds]]
) -> list[str]:
    """Render what was measured of one member, or of the mixed sweep."""
    head, unit = ["contestant", "settings"], "variant-tokens" if subject == MIXED else "tokens"
    for n in by_threads:
        head += [f"{unit}/s, {n} thread{'s' * (n > 1)}", "saemill is", f"{unit}/CPU-s", "saemill is"]
    lines = []
    for name, rounds in by_threads[args.threads[0]].items():
        cells = [name, contest.CONTESTANTS[name].setting]
        for by_name in by_threads.values():
            for key in ("tokens_per_s", "tokens_per_cpu_s"):
                cells += times(by_name[name], by_name.get("saemill"), key)
        cells += [contest.memory_cell(rounds), l0_cell(args, subject, rounds)]
        lines.append(cells)
    return [f"## {subject}", "", *table([*head, "peak MiB (after imports)", "L0"], lines)]


def times(results: Rounds, own: Rounds | None, key: str) -> list[str]:
    """Format a contestant's rate, and how many times as fast saemill is."""
    rate = contest.median_of(results, key)
    factor = contest.median_of(own, key) / rate if own else None
    return [f"{rate:,.0f}", "–" if factor is None or own is results else f"{factor:.1f}×"]


def l0_cell(args: argparse.Namespace, subject: str, rounds: Rounds) -> str:
    """Format the number of active latents: k where there is one, else as measured after the last step."""
    found = zip(goals(args, subject), rounds[0]["l0"], strict=True)
    values = [f"{l0:,.0f}" if member in MEMBERS[3:] else level for (member, level, _), l0 in found]
    return ", ".join(values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contest.add_arguments(parser)
    rows.add_arguments(parser)
    parser.add_argument(
        "--members",
        default=",".join(MEMBERS),
        type=lambda text: text.split(","),
        help="comma-separated; all by default",
    )
    parser.add_argument("--l0", type=int, default=32, help="active latents per token")
    parser.add_argument("--lr", default="1e-5", help="so small that L0 stays where it starts")
    parser.add_argument(
        "--threads", default="1,2", type=lambda text: [int(number) for number in text.split(",")]
    )
    args = parser.parse_args()
    if unknown := set(args.members) - set(MEMBERS):
        parser.error(f"unknown members {sorted(unknown)}; there are {list(MEMBERS)}")
    return args


def main() -> None:
    args = parse()
    keep_settings(args)
    words = rows.make(args.out / "rows", args)
    results = measure(args, contest.chosen(args))
    every = [
        r for by_n in results.values() for by_name in by_n.values() for rs in by_name.values() for r in rs
    ]
    lines = [contest.machine(every), ""]
    lines += [
        f"{args.latents:,} latents, L0 {args.l0}, {args.batch:,} tokens per step, lr {args.lr}, {words}; "
        f"{args.rounds} rounds of {args.steps} steps, medians. Of `{MIXED}`: one SAE of each.",
        "",
    ]
    for subject, by_threads in results.items():
        lines += subject_table(args, subject, by_threads)
    (args.out / "results.md").write_text("\n".join(lines))
    (args.out / "results.json").write_text(json.dumps(results))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
