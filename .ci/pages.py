"""A hook of MkDocs: one page per entry of every registry, the card that ``prefzoo show NAME`` prints."""

from typing import Any

from mkdocs.structure.files import File, Files

from prefzoo.cli.cards import all_pages


def on_files(files: Files, config: Any) -> Files:
    for path, content in all_pages():
        files.append(File.generated(config, path, content=content))
    return files
