"""math-verify as a process, started by its path: pairs of (gold, answer) as JSON lines in, one JSON verdict a line out.

A verdict is true, false, or null where the gold answer cannot be read.
"""

import json
import logging
import resource
import sys

ORPHAN_SECONDS = 60  # of processor time for one pair; whoever waits for it has given up by then
MEMORY = 4 * 2**30


def main() -> None:
    from math_verify import parse, verify

    logging.disable(logging.ERROR)  # it logs every text that it cannot read
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    print("ready", flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + ORPHAN_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        gold, answer = (parse(text) for text in json.loads(line))
        print(json.dumps(verify(gold, answer) if gold else None), flush=True)


if __name__ == "__main__":
    main()
