"""Writes a plugin package from templates. A template is a file whose name ends in .tmpl, in which $name, $Name and
$interface are filled in; `dot_` at the beginning of a name stands for a dot."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from anychip.errors import ConfigError
from anychip.plugin_api import API_VERSION

_TEMPLATES = Path(__file__).parent / "templates"


def write_plugin(name: str, seam: str, parent: Path) -> Path:
    """The new folder parent/anychip-NAME. Raises ConfigError for a name that is no identifier, or a folder that is
    there already."""
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ConfigError(f"new-plugin {name!r}: a device's name has lower case letters and digits, such as acme2")
    folder = parent / f"anychip-{name}"
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another --output")
    for path, text in rendered(name, seam).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return folder


def rendered(name: str, seam: str) -> dict[str, str]:
    """By path within the package, the text of every file."""
    values = {"name": name, "Name": name.capitalize(), "interface": API_VERSION}
    files = {}
    for root in (_TEMPLATES / "common", _TEMPLATES / seam):
        for template in sorted(root.rglob("*.tmpl")):
            parts = [Template(part).substitute(values) for part in template.relative_to(root).parts]
            path = "/".join(re.sub("^dot_", ".", part) for part in parts).removesuffix(".tmpl")
            files[path] = Template(template.read_text()).substitute(values)
    return files
