"""saemill beside sparsify, SAELens and dictionary_learning: speed, memory, and what is learned.

    make bench
    python -m benchmarks.train.peers --latents 6144 --k 32 -o DIR [--tokens 131072] [--seconds 60]
    python -m benchmarks.train.peers --acts STORE --site layers.4 --dead-share 0.25 --device cuda -o DIR

Each contestant is a process of its own that trains through its package's own training loop
(`benchmarks/train/contestants/`); all read the same rows in the same batches. They take turns, round after
round, and medians are reported. Speed: tokens over the median time of a step after warm-up, reading
left out; and the same over the CPU time that all threads of the process took, which other programs on
the machine disturb less (with one thread, on an idle machine, both are the same). --tokens N adds one
run of N tokens for each, with its FVU on held-out rows on the way; the time of evaluation is left out.
--seconds S adds a run of as many steps as fit into S seconds at the speed found.
FVU = Σ‖x − x̂‖² / Σ‖x − mean‖². Runs that are finished in DIR are not run again. The result is
`DIR/results.md`, raw figures in `DIR/results.json`.
"""

import argparse
import json
from typing import Any

from benchmarks.report import table
from benchmarks.settings import keep_settings
from benchmarks.train import contest, rows
from benchmarks.train.contest import Entry

Results = dict[str, dict[int, list[dict[str, Any]]]]
"""By contestant and number of threads: one result per round."""


def speed(args: argparse.Namespace, entries: dict[str, Entry]) -> Results:
    """Run a few steps of each contestant, interleaved."""
    speeds: Results = {name: {t: [] for t in args.threads} for name in entries}
    for turn in range(args.rounds):
        for threads in args.threads:
            for name, entry in entries.items():
                options = goal(args, threads) | {"steps": args.steps, "warmup": args.warmup}
                result = contest.run(args, entry, f"speed-{name}-t{threads}-r{turn}", options)
                speeds[name][threads].append(result)
    return speeds


def goal(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    return {"goals": f"topk:{args.k}:{args.lr}", "threads": threads, "dead-share": args.dead_share}


def curves(args: argparse.Namespace, entries: dict[str, Entry]) -> dict[str, dict[str, Any]]:
    """Run `--tokens` tokens of each, evaluated after an 8th, a quarter, half and all of them."""
    if not args.tokens:
        return {}
    steps = args.tokens // args.batch
    at = ",".join(str(max(1, steps // divisor)) for divisor in (8, 4, 2, 1))
    options = goal(args, args.threads[0]) | {"steps": steps, "eval-steps": at}
    return {name: contest.run(args, entry, f"tokens-{name}", options) for name, entry in entries.items()}


def equal_seconds(
    args: argparse.Namespace, entries: dict[str, Entry], speeds: Results
) -> dict[str, dict[str, Any]]:
    """Run as many steps as fit into `--seconds`, evaluated at their end."""
    if not args.seconds:
        return {}
    threads = args.threads[0]
    results = {}
    for name, entry in entries.items():
        steps = max(1, int(args.seconds / contest.median_of(speeds[name][threads], "median_step_seconds")))
        options = goal(args, threads) | {"steps": steps, "eval-steps": steps}
        results[name] = contest.run(args, entry, f"seconds-{name}", options)
    return results


def speed_table(args: argparse.Namespace, entries: dict[str, Entry], speeds: Results) -> list[str]:
    head = ["contestant", "settings"]
    for threads in args.threads:
        head += [f"tokens/s, {threads} thread{'s' * (threads > 1)} (range)", "of saemill's"]
        head += ["tokens/CPU-s", "of saemill's"]
    lines = []
    for name, entry in entries.items():
        cells = [name, entry.setting]
        for threads, results in speeds[name].items():
            rates = sorted(result["tokens_per_s"] for result in results)
            saemill_results = speeds.get("saemill", {}).get(threads)
            rate, share = contest.rate_cells(results, saemill_results, "tokens_per_s")
            cells += [f"{rate} ({rates[0]:,.0f}–{rates[-1]:,.0f})", share]
            cells += contest.rate_cells(results, saemill_results, "tokens_per_cpu_s")
        cells.append(contest.memory_cell(speeds[name][args.threads[0]]))
        lines.append(cells)
    return table([*head, "peak MiB (after imports)"], lines)


def quality_table(
    by_tokens: dict[str, dict[str, Any]], by_seconds: dict[str, dict[str, Any]], seconds: float
) -> list[str]:
    """Render held-out FVU at equal tokens, with the seconds each point took, and at equal seconds."""
    first = next(iter(by_tokens.values()), {"curve": []})
    points = [point["tokens"] for point in first["curve"]]
    head = ["contestant", "settings", *(f"FVU at {tokens:,} tokens (s)" for tokens in points)]
    head += [f"FVU after {seconds:g} s (tokens; s)"] * bool(by_seconds)
    lines = []
    for name in by_tokens or by_seconds:
        cells = [name, contest.CONTESTANTS[name].setting]
        if by_tokens:
            cells += [f"{p['fvu'][0]:.4f} ({p['seconds']:.0f})" for p in by_tokens[name]["curve"]]
        if by_seconds:
            p = by_seconds[name]["curve"][-1]
            cells.append(f"{p['fvu'][0]:.4f} ({p['tokens']:,}; {p['seconds']:.0f})")
        lines.append(cells)
    return table(head, lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    contest.add_arguments(parser)
    rows.add_arguments(parser)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", default="auto", help="for all that use Adam; auto: each one's default")
    parser.add_argument(
        "--threads", default="1,2", type=lambda text: [int(number) for number in text.split(",")]
    )
    parser.add_argument("--tokens", type=int, default=0, help="of the runs at equal tokens")
    parser.add_argument("--seconds", type=float, default=0, help="of the runs at equal seconds")
    parser.add_argument("--dead-share", type=float, default=0.0, help="latents kept dead, so that AuxK runs")
    return parser.parse_args()


def main() -> None:
    args = parse()
    keep_settings(args)
    words = rows.make(args.out / "rows", args)
    entries = contest.chosen(args)
    speeds = speed(args, entries)
    by_tokens = curves(args, entries)
    by_seconds = equal_seconds(args, entries, speeds)
    everything = [r for runs in speeds.values() for results in runs.values() for r in results]
    lines = [contest.machine(everything), ""]
    dead = f"; {args.dead_share:.0%} of the latents kept dead, AuxK running" if args.dead_share else ""
    lines += [f"{args.latents:,} latents, k {args.k}, {args.batch:,} tokens per step, {words}{dead}.", ""]
    lines += [f"Learning rate: {args.lr}. {args.rounds} rounds of {args.steps} steps.", ""]
    lines += speed_table(args, entries, speeds)
    if by_tokens or by_seconds:
        lines += quality_table(by_tokens, by_seconds, args.seconds)
    (args.out / "results.md").write_text("\n".join(lines))
    raw = {"speed": speeds, "tokens": by_tokens, "seconds": by_seconds}
    (args.out / "results.json").write_text(json.dumps(raw))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
