"""prefzoo.losses: pure functions on tensors, one registered loss per name.

>>> from prefzoo.losses import create_loss
>>> create_loss("dpo", beta=0.2).options
{'beta': 0.2}
"""

if __name__ != "prefzoo.losses":
    raise ImportError(
        "import prefzoo.losses, not losses: this folder is a part of the package 'prefzoo' (pip install -e .)"
    )

from prefzoo.losses.base import (
    LOSSES,
    MODIFIERS,
    Loss,
    create_loss,
    list_losses,
    register_loss,
    register_modifier,
)  # fmt: skip

__all__ = ["LOSSES", "MODIFIERS", "Loss", "create_loss", "list_losses", "register_loss", "register_modifier"]
