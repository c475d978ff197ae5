"""`make fuzz`: tries random inputs against every target until the time is over, and prints what broke a rule.

python tests/fuzz/run.py --minutes 2 [--only "command line"] [--seed 0]
"""

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

from targets import TARGETS  # noqa: E402
from world import world  # noqa: E402

BLOCK = 20  # tries between two looks at the clock
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
QUIET = settings(deadline=None, database=None, suppress_health_check=SLOW)


def tries(name: str, number: int, *, phases: tuple[Phase, ...], count: int = BLOCK) -> tuple[int, str]:
    """A block of tries of a target: how many, and the traceback of the smallest input that broke a rule."""
    strategy, run = TARGETS[name]
    done = 0

    @seed(number)
    @settings(QUIET, max_examples=count, phases=phases)
    @given(strategy)
    def block(case: object) -> None:
        nonlocal done
        done += 1
        run(case, world())

    try:
        block()
    except Exception:
        return done, traceback.format_exc(limit=-6)
    return done, ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--only", choices=list(TARGETS))
    parser.add_argument("--no-shrink", action="store_true", help="Report the first input, not the smallest.")
    options = parser.parse_args()
    phases = (Phase.generate,) if options.no_shrink else (Phase.generate, Phase.shrink)
    warnings.simplefilter("ignore")
    names = [options.only] if options.only else list(TARGETS)
    counts, used = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    broken, number = 0, options.seed
    print(f"seed {number}", flush=True)
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        name = min(names, key=lambda n: used[n])  # every target has the same share of the time
        start = time.process_time()
        count, text = tries(name, number, phases=phases)
        counts[name] += count
        used[name] += time.process_time() - start
        number += 1
        if text:
            broken += 1
            print(f"--- {name}, seed {number - 1}\n{text}", flush=True)
    for name, count in counts.items():
        print(f"{count:7d}  {name}, {1000 * used[name] / max(count, 1):.0f} ms each")
    print(f"{sum(counts.values()):7d}  tries, {broken} blocks with a broken rule")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
