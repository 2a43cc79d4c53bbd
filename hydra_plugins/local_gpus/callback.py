"""In the job's own interpreter: keeps what its main function returns where the launcher finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

RETURN_VALUE = "return_value.json"


class ReturnValue(Callback):
    """Writes ``return_value.json`` into the run directory: ``{"value": ...}``, or ``{"problem": why not}``."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status is not JobStatus.COMPLETED:
            return
        try:
            text = json.dumps({"value": job_return.return_value})
        except (TypeError, ValueError) as error:
            text = json.dumps(
                {"problem": f"the job's return value cannot be kept as JSON ({error}); return plain values"}
            )
        Path(config.hydra.runtime.output_dir, RETURN_VALUE).write_text(text)
