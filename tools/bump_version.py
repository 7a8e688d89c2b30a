"""Sets the version of every package, and of what they require of one another.

python tools/bump_version.py 0.2.0 [--date 2026-12-01]

The changelog's "Unreleased" becomes the version's section. Writes nothing when anything does not fit.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INIT = "core/src/anychip/__init__.py"
CHANGELOG = "CHANGELOG.md"
CHART = "deploy/helm/anychip/Chart.yaml"


def current_version(root: Path) -> str:
    found = re.search(r'^__version__ = "(.+)"$', (root / INIT).read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{INIT} has no __version__")
    return found[1]


def package_files(root: Path) -> list[Path]:
    """The pyproject.toml of every package."""
    return [
        root / "core/pyproject.toml",
        *sorted(root.glob("plugins/*/pyproject.toml")),
        root / "conformance/pyproject.toml",
    ]


def changes(root: Path, new: str, date: str) -> dict[Path, str]:
    """By file: its new content."""
    old = current_version(root)
    edited = {root / INIT: (root / INIT).read_text().replace(f'__version__ = "{old}"', f'__version__ = "{new}"')}
    for path in package_files(root):
        text = path.read_text()
        if f'\nversion = "{old}"\n' not in text:
            raise SystemExit(f"{path.relative_to(root)} is not at version {old}")
        text = text.replace(f'\nversion = "{old}"\n', f'\nversion = "{new}"\n')
        edited[path] = re.sub(rf'"(anychip(?:-\w+)?)=={re.escape(old)}"', rf'"\1=={new}"', text)
    edited[root / CHART] = _chart((root / CHART).read_text(), old, new)
    log = (root / CHANGELOG).read_text()
    if "\n## Unreleased\n" not in log:
        raise SystemExit(f'{CHANGELOG} has no section "Unreleased": nothing to release')
    edited[root / CHANGELOG] = log.replace("\n## Unreleased\n", f"\n## {new} ({date})\n", 1)
    return edited


def _chart(text: str, old: str, new: str) -> str:
    """The chart of a version: Helm takes semantic versions alone, with a dash before rc1; images have the package's."""
    for field, was, will in (("version", _semantic(old), _semantic(new)), ("appVersion", old, new)):
        if f"\n{field}: {was}\n" not in text:
            raise SystemExit(f"{CHART}: {field} is not {was}")
        text = text.replace(f"\n{field}: {was}\n", f"\n{field}: {will}\n")
    return text


def _semantic(version: str) -> str:
    return re.sub(r"(?<=\d)(?=(?:a|b|rc)\d)", "-", version)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--root", type=Path, default=ROOT)
    arguments = parser.parse_args()
    if not re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", arguments.version):
        raise SystemExit(f"{arguments.version!r} is no version such as 0.2.0 or 0.2.0rc1")
    edited = changes(arguments.root, arguments.version, arguments.date)
    for path, text in edited.items():
        path.write_text(text)
    sys.stdout.write(f"{len(edited)} files are at {arguments.version}; docs/releasing.md says what comes next\n")


if __name__ == "__main__":
    main()
