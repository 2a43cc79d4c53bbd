"""``python -m tests.training.full_disk RANK STEP OVERRIDE …``: training whose disk fills up in a save.

In saves from ``STEP`` on process ``RANK`` can write no file above 4 kB.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Any

MOST = 4096


def main() -> None:
    rank, step, *overrides = sys.argv[1:]
    sys.argv = ["training", *overrides]
    if os.environ["RANK"] == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from training.trainer import RolloutTrainer

        save = RolloutTrainer._save_checkpoint

        def limited(self: RolloutTrainer, *given: Any) -> None:
            if self.state.global_step >= int(step):
                resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, resource.RLIM_INFINITY))
            try:
                save(self, *given)
            finally:  # else it could not say what happened: its output may be a file too
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        RolloutTrainer._save_checkpoint = limited  # type: ignore[method-assign]
    from training.__main__ import main

    main()


if __name__ == "__main__":
    main()
