"""Stands empty libraries in for CUDA's, so that a torch that was built for CUDA can be imported without them.

torch 2.9.0, which torch_xla needs, is on the package index with CUDA alone. Its libraries name CUDA's, 4 GB in all, and
call none of them where there is no GPU. This reads what they name, and compiles libraries of these names, versions and
symbols, each of which does nothing, into the first folder of torch's own search path that it looks for CUDA in.

    python tools/stub_cuda_libraries.py .venv-tpu
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path("nvidia/cuda_runtime/lib")
"""Below site-packages. torch's libraries look there for all of CUDA's."""
_CUDA = re.compile(r"lib(cu|nccl|nv)")
_PREFIXES = ("cublas", "cudnn", "cufft", "cufile", "cuFile", "curand", "cusolver", "cusparse", "nccl", "nvshmem")
"""Of symbols that have no version; whichever library has them, the loader finds them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("venv", type=Path)
    packages = next(parser.parse_args().venv.glob("lib/python3*/site-packages"))
    torch = packages / "torch"
    libraries = [*(torch / "lib").glob("*.so*"), *torch.glob("_C*.so")]
    if not libraries:
        sys.exit(f"no torch in {packages}")
    missing = {name for library in libraries for name in needed(library) if _CUDA.match(name)}
    missing -= {library.name for library in libraries}
    versioned, plain = symbols(libraries)
    folder = packages / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(sorted(missing)):
        # Most versions are the library's own name; what is left over goes to whichever comes first.
        versions = {version: names for version, names in versioned.items() if version == name}
        if place == 0:
            versions |= {version: names for version, names in versioned.items() if version not in missing}
        build(folder / name, versions, plain if place == 0 else ())
    print(f"{len(missing)} empty libraries in {folder}")
    return 0


def needed(library: Path) -> list[str]:
    """The libraries that one names."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", printed("readelf", "-d", library))


def symbols(libraries: Iterable[Path]) -> tuple[dict[str, set[str]], set[str]]:
    """What the libraries take from others that may be CUDA's: by version, and without one."""
    versioned, plain, defined = defaultdict[str, set[str]](set), set[str](), set[str]()
    for library in libraries:
        for line in printed("nm", "-D", library).splitlines():
            *_, kind, symbol = line.split()
            name, _, version = symbol.replace("@@", "@").partition("@")
            if kind not in ("U", "w"):
                defined.add(name)
            elif not version:
                plain.add(name)
            elif not version.startswith(("GLIBC", "CXXABI", "GCC", "GOMP", "OMP")):
                versioned[version].add(name)
    return versioned, {name for name in plain - defined if name.startswith(_PREFIXES)}


def build(target: Path, versions: dict[str, set[str]], plain: Iterable[str]) -> None:
    """A library whose functions all return 0."""
    names = sorted({*plain}.union(*versions.values()))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "stub.c", Path(folder) / "versions"
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in names))
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{target.name}", "-o", str(target), str(source)]
        if versions:
            script.write_text(
                "".join(
                    f"{version} {{ global: {' '.join(f'{name};' for name in sorted(of))} }};\n"
                    for version, of in versions.items()
                )
            )
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


def printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
