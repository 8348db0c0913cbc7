"""Write tests/durations.txt from what pytest printed with `--durations=0 --durations-min=0.05`.

python tests/tools/durations.py LOG COLLECTED CPU_SECONDS

LOG is that output, COLLECTED what `pytest --nightly --collect-only -q` printed. CPU_SECONDS is the
user time of the run: on a busy machine tests seem longer than they are, and are scaled by it.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

HEADER = """\
# Seconds per case, on one core, of tests whose cases take more than {least} s. The default tier
# runs as many cases of a test as take {budget} s, and none if one takes more than {most} s
# (tests/support/tiers.py). "keep" stands behind those of which it runs one all the same, as
# nothing else has their subject. Rewritten by tests/tools/durations.py.
"""


def main(log: str, collected: str, cpu_seconds: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from tiers import DEFAULT, DURATIONS, LEAST, read_durations, test_of

    seconds: Counter[str] = Counter()
    cases: dict[str, set[str]] = {}
    for line in Path(log).read_text().splitlines():
        if found := re.match(r"([\d.]+)s (?:call|setup|teardown)\s+(\S.*)", line):
            name = found[2].strip()
            seconds[test_of(name)] += float(found[1])  # type: ignore[assignment]
            cases.setdefault(test_of(name), set()).add(name)
    ran = Counter(test_of(n) for n in Path(collected).read_text().splitlines() if "::" in n)
    scale = float(cpu_seconds) / sum(seconds.values())
    before = read_durations()
    lines = dict(before)
    for test, total in seconds.items():
        mean = total * scale / max(ran[test], len(cases[test]))
        lines[test] = (round(mean, 1), before.get(test, (0, False))[1])
    text = HEADER.format(least=LEAST, budget=DEFAULT.budget, most=DEFAULT.most)
    for test, (mean, keep) in sorted(lines.items()):
        if mean > LEAST or keep:
            text += f"{test} {mean:.1f}{' keep' if keep else ''}\n"
    DURATIONS.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
