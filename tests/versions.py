"""The two sets of versions that the suite runs with besides the newest. Needs nothing but a Python with pip.

    python -m tests.versions lowest [torch==2.13.0 …]   the lower bounds of pyproject.toml, as exact versions
    python -m tests.versions pinned > constraints.txt   what is installed beside this Python

`lowest` takes the versions that it is given in place of those bounds.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
NOT_PINNED = re.compile(r"lcm[_-]distill|pip|setuptools|wheel|nvidia-.*|cuda-.*|triton")
HEAD = """\
# The versions that the suite runs with, those of the libraries' own libraries included. `make demo`, `make test`,
# `make lint` (so CI as well) and the README's installation take them. Made from an environment in which the suite had
# passed, on Linux with Python {python}; after installing other versions there and running the suite again:
#     .venv/bin/python -m tests.versions pinned > constraints.txt
# A version that needs a newer Python than 3.10 is pinned only there, and so is huggingface_hub, of which the others'
# last releases for 3.10 need an older one: on 3.10 pip takes the newest version that fits.
# torch is pinned without its build (+cpu, +cu130); CUDA's own packages, which torch chooses, are not pinned."""


def lowest(instead: list[str]) -> list[str]:
    """name==version for each of pyproject's dependencies, dev's included; `instead` has those to use for its bounds."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    others = {entry.partition("==")[0]: entry for entry in instead}
    found = []
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, version = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement).groups()
        marker = requirement.partition(";")[2]
        found.append(others.pop(name, f"{name}=={version}") + (f";{marker}" if marker else ""))
    if others:
        raise SystemExit(f"not among the dependencies: {', '.join(others)}")
    return found


def pinned() -> list[str]:
    """name==version for all that is installed, with a marker where it does not go with Python 3.10."""
    found = []
    for distribution in distributions():
        name, version = distribution.metadata["Name"], distribution.version.partition("+")[0]
        if NOT_PINNED.fullmatch(name.lower()):
            continue
        newest_needed = re.search(r">=\s*3\.(\d+)", distribution.metadata["Requires-Python"] or "")
        minor = int(newest_needed[1]) if newest_needed else 0
        if name == "huggingface_hub":
            minor = max(minor, 11)
        found.append(f"{name}=={version}" + (f'; python_version >= "3.{minor}"' if minor > 10 else ""))
    return sorted(set(found), key=str.lower)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command == "lowest":
        print("\n".join(lowest(rest)))
    elif command == "pinned" and not rest:
        print("\n".join([HEAD.format(python=f"{sys.version_info.major}.{sys.version_info.minor}"), *pinned()]))
    else:
        raise SystemExit(__doc__)
