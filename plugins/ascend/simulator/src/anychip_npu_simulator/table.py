"""The table of simulated ops in README.md: python -m anychip_npu_simulator.table"""

from __future__ import annotations

import sys

from anychip_npu_simulator.install import install

_CAST = "| `npu_format_cast` | npu_format_cast | 310P, 910B, 910C, 950 | its result | no |"
_HEAD = "| op | semantics from | generations | takes FRACTAL_NZ | the vendor's meta function |\n|---|---|---|---|---|"


def table() -> str:
    """Markdown, by op."""
    from anychip_npu_simulator.calls import OPS
    from anychip_npu_simulator.kernels import has_meta

    rows = [_CAST]
    for name, op in OPS.items():
        meta = "yes" if has_meta(name) else f"of `{op.opinion}`" if op.opinion else "no"
        nz = ", ".join(op.nz) or "-"
        rows.append(f"| `{name}` | {op.document} | {', '.join(op.products)} | {nz} | {meta} |")
    return "\n".join([_HEAD, *sorted(rows)])


if __name__ == "__main__":
    install()
    sys.stdout.write(table() + "\n")
