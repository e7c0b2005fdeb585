#!/usr/bin/env python
"""Permutation tests between runs of evaluate.py.

    python stats.py results/RUN                          one run against chance, and its languages
    python stats.py results/BASE results/TUNED           two runs on the same probes: what changed, layer by layer
    python stats.py results/A results/B results/C        three or more: a leaderboard with the ranks each may have
    python stats.py --unpaired results/A results/B       two runs on different probes
    python stats.py --by layer,lang --pairs BASE TUNED BASE2 TUNED2 ...
                                                         several pairs side by side, English beside Arabic

Verdicts, a row each, at 5 % after adjustment for the number of rows:
    improves, worsens     B differs from A
    no difference found   no significant change, though one of medium size (Cohen's h = 0.5, 24 points around
                          50 %) would have been found in 4 of 5 samples; the table says which size would
    not measurable        no significant change, and the sample is too small to find even a medium one
    under 20 units        no verdict, whatever p is
    described only        subcategories hold too few probes each for tests
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from eicap import InputError, comparison, tables


def facets(text: str) -> list[str]:
    names = [name.strip().replace("language", "lang") for name in text.split(",")]
    if len(names) > 2 or len(set(names)) < len(names) or not set(names) <= set(comparison.FACETS):
        raise argparse.ArgumentTypeError(f"one or two different ones of {', '.join(comparison.FACETS)}")
    return names


def seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that evaluate.py left")
    parser.add_argument("--pairs", action="store_true", help="the runs come two by two: A B A B ...")
    parser.add_argument("--unpaired", action="store_true", help="A and B are on different probes")
    group = parser.add_argument_group("what is tested")
    group.add_argument(
        "--by",
        type=facets,
        default=["layer"],
        metavar="FACET[,FACET]",
        help=f"a row for each value of {', '.join(comparison.FACETS)}, or of two of them crossed (default: layer)",
    )
    group.add_argument(
        "--metric",
        choices=["correct", "correct_plain", "logprob"],
        default="correct",
        help="correct: averaged over rotations; correct_plain: options as written; "
        "logprob: log-probability of the right option",
    )
    group.add_argument(
        "--adjust",
        choices=["holm", "bh", "maxt"],
        default="holm",
        help="for many tests: holm, or maxt, which uses how the rows hang together: the chance of even one false "
        "finding stays under 5 %%; bh: the share of false findings does",
    )
    parser.add_argument("--partial", action="store_true", help="take what unfinished runs have so far")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw differences with intervals (needs matplotlib)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    count, compares = len(args.runs), args.pairs or len(args.runs) == 2
    if args.pairs and count % 2:
        raise InputError(f"--pairs: {count} runs, but they come two by two: A B A B ...")
    if args.unpaired and (count != 2 or args.pairs):
        raise InputError(f"--unpaired compares two runs; {count} were given")
    if args.adjust == "maxt" and (count == 1 or args.unpaired):
        raise InputError("--adjust maxt needs runs on the same probes; use holm or bh")
    if args.metric == "logprob" and count == 1:
        raise InputError("--metric logprob: there is no chance level for it; give two runs, or use correct")
    if args.plot and (args.unpaired or not compares):
        raise InputError("--plot draws differences of pairs: give two runs, or use --pairs")


def compare(args: argparse.Namespace) -> tuple[dict, str]:
    """The report as --json writes it, and as the terminal shows it."""
    check(args)
    runs = comparison.read(args.runs, args.partial)
    comparison.check_metric(runs, args.metric)
    how = (args.by, args.metric, args.adjust, args.seed)
    if args.unpaired:
        report = comparison.compare_samples(*runs, *how)
        text = tables.samples(report)
    elif len(runs) == 1:
        report = comparison.against_chance(runs[0], *how)
        text = tables.chance(report)
    elif args.pairs or len(runs) == 2:
        reports = comparison.compare_pairs(list(zip(runs[::2], runs[1::2])), *how)
        report = {"pairs": reports} if args.pairs else reports[0]
        text = tables.pairs(reports) if args.pairs else tables.pair(report)
        if args.plot:
            tables.plot(reports, args.plot)
    else:
        report = comparison.leaderboard(runs, *how)
        text = tables.leaderboard(report)
    unfinished = list(dict.fromkeys(run.label for run in runs if not run.run.get("finished")))
    if unfinished:
        text += f"\nunfinished, compared as far as they are: {', '.join(unfinished)}"
    return report | {"unfinished": unfinished}, text


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = arguments(argv)
    try:
        report, text = compare(args)
        if args.json:
            try:
                args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"--json {args.json}: cannot be written ({error.strerror})") from None
    except InputError as error:
        print(f"stats.py: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `stats.py ... | head` ends quietly
    sys.stdout.reconfigure(errors="replace")  # a terminal without these characters still gets its table
    sys.exit(main())
