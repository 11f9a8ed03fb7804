"""Where the host's time in a step goes: our step with its launch replaced by nothing, under cProfile.

python -m bench.profile_host [--case '^148x16 fp32$'] [--steps 500] [--lines 25]

cProfile makes every call dearer, so shares count and not sums; the time without it stands above them.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import sys
import time
from pathlib import Path

import torch

from bench.environment import choose_triton_backend

WARM_UP_STEPS = 3


def main() -> int:
    """Prints a table of functions by their own time, in microseconds a step."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile_host", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="^148x16 fp32$", help="regular expression; the first match is profiled")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lines", type=int, default=25)
    arguments = parser.parse_args()
    choose_triton_backend()
    from bench.cases import CASES, make_parameters
    from bench.host import HOST_PEERS
    from bench.peers import Request

    case = next((case for case in CASES if re.search(arguments.case, case.name)), None)
    if case is None:
        print(f"no case matches {arguments.case!r}", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    params = make_parameters(case, device)
    groups = [{"params": params[index :: case.num_groups]} for index in range(case.num_groups)]
    stepper = HOST_PEERS[-1].build(Request(groups, device, case.clips))
    with stepper.context():
        for _ in range(WARM_UP_STEPS):
            stepper.step()
        start = time.perf_counter()
        for _ in range(arguments.steps):
            stepper.step()
        bare = (time.perf_counter() - start) / arguments.steps
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(arguments.steps):
            stepper.step()
        profile.disable()
    print(f"{case.name}: {bare * 1e6:.1f} us a step without the profiler\n")
    print(f"{'own us':>10} {'with callees':>14} {'calls a step':>14}  function")
    # Of each function: calls without recursion, all calls, own seconds, seconds with callees, callers.
    entries = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    dearest = sorted(entries, key=lambda item: -item[1][2])[: arguments.lines]
    for (path, line, name), (_, calls, own, whole, _) in dearest:
        own_us, whole_us = own / arguments.steps * 1e6, whole / arguments.steps * 1e6
        print(f"{own_us:10.2f} {whole_us:14.2f} {calls / arguments.steps:14.1f}  {name} ({Path(path).name}:{line})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
