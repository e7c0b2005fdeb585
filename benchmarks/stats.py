"""Time stats.py on two runs of 3,000 probes, and its permutation tests beside scipy's; print seconds and ratios.

    python benchmarks/stats.py

One core. Two shapes: 600 dialogues of five probes, one a layer, and 3,000 dialogues of one probe. The command is timed
from start to exit, best of three; scipy.stats.permutation_test gets the same differences, all rows in one vectorised
call, and the same number of resamples. Needs requirements-dev.txt.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
from scipy.stats import permutation_test  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from eicap import permutation, results  # noqa: E402

LAYERS = ["foundational", "dimensional", "appraisal", "value", "social"]
FLIPS = 100_000


def rows(seed: int, dialogues: int, probes: int) -> list[dict]:
    """Random rows of results in four rotations, as long as real ones."""
    rng, found = np.random.default_rng(seed), []
    for k in range(dialogues):
        for place in range(probes):
            answer, (pred, plain) = place % 4, rng.integers(0, 4, 2).tolist()
            row = {"id": f"en-{k:04d}-{place}", "dialogue": f"en-{k:04d}", "lang": "en", "culture": None}
            row |= {"layer": LAYERS[(k + place) % 5], "skill": "cause", "subcategory": "agency", "pair": None}
            row |= {"answer": answer, "orders": [[(j + r) % 4 for j in range(4)] for r in range(4)]}
            row |= {"logprobs": np.log(rng.random((4, 4))).tolist(), "pred_plain": plain, "pred": pred}
            found.append(row | {"correct_plain": plain == answer, "correct": pred == answer})
    return found


def write_run(folder: Path, found: list[dict]) -> None:
    results.Part(folder, 0).append(found)
    results.write_json(folder / "run.json", {"identity": {"bench": {"en": "same"}}, "finished": True})
    probes: dict[str, list[str]] = {}
    for row in found:
        probes.setdefault(row["dialogue"], []).append(row["id"])
    results.merge(folder, probes.items())


def seconds(work, times: int = 3) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def command(*arguments) -> float:
    line = [sys.executable, str(ROOT / "stats.py"), *map(str, arguments)]
    return seconds(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))


def main() -> None:
    print(f"numpy {np.__version__}, one core, best of 3")
    print(f"start-up alone (--help)                                 {command('--help'):7.2f} s")
    for dialogues, probes in ((600, 5), (3000, 1)):
        print(f"\n3,000 probes in {dialogues} dialogues, five layers")
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder, name) for name in "ab"]
            for seed, run in enumerate(runs):
                run.mkdir()
                write_run(run, rows(seed, dialogues, probes))
            for more in ([], ["--adjust", "maxt"], ["--adjust", "maxt", "--metric", "logprob"]):
                print(f"stats.py A B {' '.join(more):<43}{command(*runs, *more):7.2f} s", flush=True)
        compare_with_scipy(dialogues, probes)


def compare_with_scipy(dialogues: int, probes: int) -> None:
    """Differences of five rows; where a dialogue has one probe, each row has its own dialogues."""
    rng = np.random.default_rng(0)
    d = rng.choice([-1, 0, 1], (dialogues, 5), p=[0.15, 0.7, 0.15])
    if probes == 1:
        d[np.arange(5) != np.arange(dialogues)[:, None] % 5] = 0
    n = np.ones_like(d)
    max_t = seconds(lambda: permutation.max_t(d, FLIPS, rng))
    flips = seconds(lambda: permutation.random_flips(d, FLIPS, rng))
    exact = seconds(lambda: [permutation.sign_flip(row) for row in d.T])
    bootstrap = seconds(lambda: permutation.bootstrap(d, n, 10_000, rng))

    def scipy():
        return permutation_test(
            (d,), lambda x, axis: np.sum(x, axis=axis), permutation_type="samples", vectorized=True,
            n_resamples=FLIPS, batch=1000, rng=rng,
        )  # fmt: skip

    theirs = seconds(scipy, times=1)
    for name, ours in (("max-T", max_t), ("random flips", flips)):
        text = f"{name}, five rows, {FLIPS:,} flips"
        print(f"{text:<56}{ours:7.2f} s   scipy {theirs:6.2f} s   {theirs / ours:5.1f} x")
    print(
        f"{'exact p of five rows, by convolution':<56}{exact:7.4f} s   scipy {theirs:6.2f} s   {theirs / exact:5.0f} x"
    )
    print(f"{'bootstrap, five rows, 10,000 draws':<56}{bootstrap:7.2f} s", flush=True)


if __name__ == "__main__":
    main()
