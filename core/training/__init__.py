"""Training: the one loop that runs every algorithm."""

from prefzoo.training.config import TrainConfig
from prefzoo.training.engine import NonFiniteError
from prefzoo.training.run import Run, train

__all__ = ["NonFiniteError", "Run", "TrainConfig", "train"]
