"""Training: the one loop that runs every algorithm."""

from prefzoo.training.config import TrainConfig
from prefzoo.training.engine import NonFiniteError
from prefzoo.training.run import Run, Step, Steps, load_run_policy, steps, train

__all__ = ["NonFiniteError", "Run", "Step", "Steps", "TrainConfig", "load_run_policy", "steps", "train"]
