"""Print constraints.txt: the versions, in this environment, of everything that `prefzoo[test,dev]` pulls in."""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HEADER = """\
# The versions the tests ran with (`make constraints` writes this file). Not requirements: pyproject.toml has those.
# pip install -c constraints.txt -e ".[test,dev]"
"""


def main() -> None:
    pinned: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement("prefzoo[test,dev]")]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is required but not installed: make venv first") from None
        if name != "prefzoo":
            pinned[name] = Version(found.version).public  # without a local label such as +cpu
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in found.requires or ():
                wanted = Requirement(line)
                if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                    todo.append(wanted)
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(pinned.items())))


if __name__ == "__main__":
    main()
