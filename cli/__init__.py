"""prefzoo.cli: the ``prefzoo`` command. Nothing heavy is imported before a command runs."""

from prefzoo.cli.app import main

__all__ = ["main"]
