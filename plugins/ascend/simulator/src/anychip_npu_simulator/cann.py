"""Builds and loads the simulated CANN: the libraries that the vendor's torch_npu wheel links against.

Hand-written C (cann/*.c) has what matters: memory, copies, streams, events, devices, graphs, collectives. Every other
symbol that the installed wheel needs is found by `nm` and answers 0, so that a wheel of another version links as well.
What is built lies in a cache folder, one for each wheel and each state of the sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

from anychip_npu_simulator.errors import SimulatorUnavailable

_SOURCES = Path(__file__).with_name("cann")
_ALIASES = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")
"""Libraries of CANN that the wheel names beside libascendcl; each is empty and depends on it."""
_SYSTEM = (
    "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
)  # fmt: skip
_OF_PYTHON = ("Py", "_Py")
_loaded: list[ctypes.CDLL] = []
"""What dlopen keeps for the whole process, as it does for any library."""


def find_wheel() -> Path:
    """The folder of the installed torch_npu, which is not imported."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise SimulatorUnavailable(
            "torch_npu is not installed; pip install torch==2.13.0 torch_npu==2.13.0 pyyaml numpy"
        )
    return Path(spec.origin).parent


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        remedy = "apt-get install gcc binutils"
        raise SimulatorUnavailable(
            f"the simulated CANN is built by {command[0]}, which is missing; {remedy}"
        ) from error
    if done.returncode:
        raise SimulatorUnavailable(f"{' '.join(command[:2])} failed: {done.stderr[-2000:]}")
    return done.stdout


def defined_symbols(library: Path) -> set[str]:
    return {
        line.split()[-1].partition("@")[0] for line in _run("nm", "-D", "--defined-only", str(library)).splitlines()
    }


def _needed_symbols(library: Path) -> set[str]:
    rows = [line.split() for line in _run("nm", "-D", "--undefined-only", str(library)).splitlines()]
    return {row[-1].partition("@")[0] for row in rows if row[-2] == "U"}


def missing_symbols(wheel: Path) -> list[str]:
    """What the wheel's libraries need of CANN, sorted."""
    libraries = [*wheel.glob("lib/*.so"), *wheel.glob("_C.*.so")]
    torchs = (wheel.parent / "torch" / "lib").glob("lib*.so")
    named = [Path(_run("gcc", f"-print-file-name={name}").strip()) for name in _SYSTEM]
    systems = [path for path in named if path.is_absolute()]  # gcc repeats a name that it does not find
    needed = set[str]().union(*map(_needed_symbols, libraries))
    there = set[str]().union(*map(defined_symbols, [*libraries, *torchs, *systems]))
    return sorted(name for name in needed - there if not name.startswith(_OF_PYTHON))


def _compile(*arguments: str) -> None:
    _run("gcc", "-O1", "-fPIC", "-shared", "-w", *arguments)


def _build(wheel: Path, folder: Path) -> None:
    sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
    written = folder / "written.so"
    _compile("-o", str(written), *sources)
    plain = (_SOURCES / "plain.txt").read_text().split()  # what the wheel looks up by name at run time
    rest = {*missing_symbols(wheel), *plain} - defined_symbols(written)
    lines = ['#include "simulator.h"']
    for i, name in enumerate(sorted(rest)):
        body = f'{{ return sim_trace("{name}"); }}'
        lines.append(f'long rest_{i}(void) __asm__("{name}"); long rest_{i}(void) {body}')
    (folder / "rest.c").write_text("\n".join(lines))
    _compile(
        "-Wl,-soname,libascendcl.so",
        "-o",
        str(folder / "libascendcl.so"),
        f"-I{_SOURCES}",
        *sources,
        str(folder / "rest.c"),
    )
    (folder / "empty.c").write_text("static int nothing;\n")
    for name in _ALIASES:
        flags = [f"-Wl,-soname,lib{name}.so", "-Wl,--no-as-needed", f"-L{folder}", "-lascendcl"]
        _compile("-o", str(folder / f"lib{name}.so"), str(folder / "empty.c"), *flags)
    written.unlink()


def build(cache: Path | None = None) -> Path:
    """The folder of the libraries, which are built where they are not yet there."""
    wheel = find_wheel()
    parts = [importlib.metadata.version("torch_npu"), Path(__file__).read_text()]
    parts += [path.read_text() for path in sorted(_SOURCES.iterdir())]
    root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anychip" / "npu-simulator"
    folder = root / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            _build(wheel, made)
            try:
                made.rename(folder)
            except OSError:  # another process was first
                if not folder.exists():
                    raise
    return folder


def load() -> ctypes.CDLL:
    """Loads the libraries so that torch_npu's find their names there; returns libascendcl."""
    if not _loaded:
        folder = build()
        for name in ("ascendcl", *_ALIASES):
            _loaded.append(ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL))
    return _loaded[0]
