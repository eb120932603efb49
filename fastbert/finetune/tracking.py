"""Curves beside the log: Weights & Biases, where it is asked for. It obeys WANDB_MODE=offline."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.finetune.needs import needs


class Wandb:
    """A run of wandb, which goes on where it was resumed.

    Args:
        folder: of the run; files of wandb are kept there.
        settings: of the run.

    Raises:
        UserError: wandb is not installed, or cannot begin: nobody is logged in, for instance.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = needs("wandb")
        try:
            self._run: Any = wandb.init(
                project="fastbert",
                name=folder.name,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise UserError(f"report_to = 'wandb': {error} (or set WANDB_MODE=offline)") from None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a row."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
