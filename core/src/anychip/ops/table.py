"""Resolves each op once, at load: the platform's override where it fits, the reference otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

from anychip.errors import InvalidOverride, Unsupported
from anychip.ops.reference import REFERENCE_OPS, CompositeOps
from anychip.plugin_api import Platform, RegionCompiler
from anychip.plugin_api.ops import ADAPTER_OPS, COMPILED_OPS, COMPOSITE_OPS, OP_VERSIONS, Ops

STEP_PROGRAM = "the step program"
"""What serves an op that a compiled step holds."""


@dataclass(frozen=True, slots=True)
class OpTable:
    """`ops` is what models call; `served_by` and `notes` are what doctor prints."""

    ops: Ops
    served_by: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def reference_ops(self) -> tuple[str, ...]:
        """Ops without an override, composite ones last."""
        names = [name for name, source in self.served_by.items() if source == "reference"]
        return tuple(sorted(names, key=lambda name: (name in COMPOSITE_OPS, name)))


def resolve_platform_ops(platform: Platform, *, require_native: bool = False) -> OpTable:
    """The ops of an opened platform."""
    table = resolve_ops(
        platform.name,
        platform.ops(),
        require_native=require_native,
        compiler=platform.compiler(),
        compiled_steps=platform.context.manifest.seam == "step",
        never_run=frozenset() if platform.capabilities.lora else ADAPTER_OPS,
    )
    return replace(table, notes=(*table.notes, *platform.notes))


def resolve_ops(
    platform: str,
    overrides: Mapping[str, Callable[..., Any]],
    *,
    require_native: bool = False,
    compiler: RegionCompiler | None = None,
    compiled_steps: bool = False,
    never_run: frozenset[str] = frozenset(),
) -> OpTable:
    """A compiler makes COMPILED_OPS out of the reference, where they have no override. With `compiled_steps` a step
    program runs whatever has no override, and none of it as reference. Nothing needs to serve ops that are `never_run`.
    Raises InvalidOverride for an unknown op, a newer version or a wrong signature; Unsupported when require_native is
    set and a single op has no override."""
    chosen = SimpleNamespace(**REFERENCE_OPS)
    served_by = dict.fromkeys((name for name in REFERENCE_OPS if name not in never_run), "reference")
    notes = []
    for name, override in overrides.items():
        note = check_override(platform, name, override)
        if note:
            notes.append(note)
            continue
        setattr(chosen, name, override)
        served_by[name] = f"{platform} ({override.__module__}.{override.__qualname__})"
    composite = CompositeOps(cast(Ops, chosen))
    for name in COMPOSITE_OPS:
        if served_by[name] == "reference":
            setattr(chosen, name, getattr(composite, name))
    for name in COMPILED_OPS:
        if compiler is not None and served_by[name] == "reference":
            setattr(chosen, name, compiler.compile(getattr(chosen, name), name=name))
            served_by[name] = f"{platform}'s compiler, from the reference"
    if compiled_steps:
        served_by = {n: STEP_PROGRAM if source == "reference" else source for n, source in served_by.items()}
    if require_native:
        # A composite op without an override is made of single ones: those must be native.
        missing = [n for n, source in served_by.items() if source == "reference" and n not in COMPOSITE_OPS]
        if missing:
            raise Unsupported(f"anychip-{platform}", [f"--require-native: no override of {name}" for name in missing])
    return OpTable(cast(Ops, chosen), served_by, tuple(notes))


def check_override(platform: str, name: str, override: Callable[..., Any]) -> str:
    """A note when the override is too old to be called, "" when it fits."""
    where = f"{platform}: override of {name!r} ({getattr(override, '__qualname__', override)})"
    if name not in OP_VERSIONS:
        raise InvalidOverride(f"{where}: no such op; there are {', '.join(sorted(OP_VERSIONS))}")
    declared = getattr(override, "__anychip_op__", None)
    if declared is None or declared[0] != name:
        raise InvalidOverride(f"{where}: mark it with @op_override({name!r}, version={OP_VERSIONS[name]})")
    if declared[1] > OP_VERSIONS[name]:
        raise InvalidOverride(
            f"{where}: written for version {declared[1]}, this core has {OP_VERSIONS[name]}; upgrade anychip"
        )
    expected = inspect.signature(REFERENCE_OPS[name]).parameters
    actual = inspect.signature(override).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in actual.values())
    for argument, parameter in actual.items():
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise InvalidOverride(f"{where}: {argument!r} is positional-only; ops are called by keyword")
        if argument not in expected and parameter.default is inspect.Parameter.empty:
            raise InvalidOverride(f"{where}: requires {argument!r}, which op {name!r} does not pass")
    missing = [] if takes_any else [argument for argument in expected if argument not in actual]
    for argument in missing:
        if expected[argument].default is inspect.Parameter.empty:
            raise InvalidOverride(f"{where}: lacks the argument {argument!r}; expected {', '.join(expected)}")
    if missing:
        return f"{where} does not know {', '.join(missing)}; the reference runs"
    return ""
