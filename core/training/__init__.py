"""Training: the one loop that runs every algorithm."""

from prefzoo.training.config import TrainConfig
from prefzoo.training.engine import NonFiniteError
from prefzoo.training.run import Run, Step, Steps, load_run_policy, steps, train
from prefzoo.training.stopping import Stopped

__all__ = ["NonFiniteError", "Run", "Step", "Steps", "Stopped", "TrainConfig", "load_run_policy", "steps", "train"]
