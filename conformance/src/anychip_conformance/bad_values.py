"""Rows that are no numbers, put among rows that are; and what must not be seen of them beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from anychip_conformance.device import Device
from anychip_conformance.row_calls import Maker, RowCall

Fill = Literal["nan", "one", "mixed", "inf", "-inf"]
"""nan: all of a row; one: a single NaN in its middle; mixed: NaN, both infinities and the largest number in turns."""


def fill_row(row: Tensor, fill: Fill) -> None:
    """Overwrites one row, whatever its shape."""
    if fill == "one":
        flat = torch.zeros(row.numel(), dtype=torch.bool)
        flat[row.numel() // 2] = True
        row.masked_fill_(flat.view(row.shape).to(row.device), float("nan"))
        return
    most = torch.finfo(row.dtype).max
    values = {"nan": [np.nan], "mixed": [np.nan, np.inf, -np.inf, most], "inf": [np.inf], "-inf": [-np.inf]}[fill]
    row.copy_(torch.tensor(np.resize(values, tuple(row.shape))).to(row.dtype))


def spoil(call: RowCall, bad: Sequence[int], fill: Fill) -> None:
    """Overwrites the inputs of these rows."""
    for row in bad:
        for values in call.inputs.values():
            fill_row(values[call.rows[row]], fill)


def check_others(device: Device, make: Maker, bad: Sequence[int], fill: Fill) -> RowCall:
    """Two calls, of which the second has bad rows: the other rows keep every bit, also in a cache; ids of all rows are
    in range. Returns the second."""
    clean, spoiled = make(), make()
    expected = clean.run(clean.inputs)
    spoil(spoiled, bad, fill)
    found = spoiled.run(spoiled.inputs)
    for row, mine in enumerate(clean.rows):
        if row in bad:
            continue
        for name, values in found.items():
            device.same_bits(
                f"{name} of row {row} beside a bad one", values[mine].contiguous(), expected[name][mine].contiguous()
            )
        if clean.held is not None and spoiled.held is not None:
            device.same_bits(f"what row {row} keeps, beside a bad one", spoiled.held(row), clean.held(row))
    for name, count in spoiled.ids.items():
        in_range(name, found[name], count)
    return spoiled


def in_range(what: str, ids: Tensor, count: int) -> None:
    values = ids.to("cpu").long()
    wrong = values[(values < 0) | (values >= count)]
    assert not len(wrong), f"{what}: id {int(wrong[0])}, where there are {count}"
