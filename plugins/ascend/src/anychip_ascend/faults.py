"""The vendor's errors in anychip's words: what a code means, whether the process survives it, what to do. Imports no
torch.

Sources: `acl/error_codes/rt_error_codes.h` in the torch_npu wheel; CANN's fault codes E* as its messages carry them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anychip.plugin_api import DeviceFault


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    kind: str
    what: str
    remedy: str
    fatal: bool = True


_RESTART = "restart the engine; the process cannot use the device any more"
_MEMORY = "lower --max-num-batched-tokens or --memory-fraction, or end what else uses the device (npu-smi info)"
_REPLACE = "take the device out of ASCEND_RT_VISIBLE_DEVICES, and see `npu-smi info -t ecc -i ID`; it may need repair"
_LINKS = (
    "see the logs of the other ranks first: the one that fell out first says why; then `hccn_tool -i ID -link -g`, and "
    "HCCL_CONNECT_TIMEOUT, which must be longer than the slowest rank takes to start"
)
_KERNEL = "restart the engine; report the call that CANN's log names (~/ascend/log, ASCEND_SLOG_PRINT_TO_STDOUT=1)"
_ARGUMENT = "report this to anychip: the plugin called the vendor's op with what CANN refuses; the line says what"

OUT_OF_MEMORY = Meaning(kind="out_of_memory", what="is out of memory", remedy=_MEMORY, fatal=False)
_STREAMS = Meaning(
    kind="out_of_streams", what="has no stream left, of which every captured graph takes some",
    remedy="start with --device-opt graphs=pieces or graphs=off, or lower --max-num-seqs, and upgrade the driver (HDK)",
)  # fmt: skip
_ECC = Meaning(kind="memory_error", what="reports memory that is broken (ECC)", remedy=_REPLACE)
_PEERS = Meaning(kind="peer_lost", what="does not reach another rank through HCCL", remedy=_LINKS)
_HANG = Meaning(kind="timeout", what="has not finished a kernel in time", remedy=_KERNEL)
_CRASH = Meaning(kind="illegal_access", what="stopped a kernel at a fault of its own", remedy=_KERNEL)
_CAPTURE = Meaning(
    kind="graph", what="cannot capture what a step does",
    remedy="start with --device-opt graphs=off, and report this to anychip",
)  # fmt: skip
_REFUSED = Meaning(kind="refused", what="refuses an op's arguments", remedy=_ARGUMENT)
_GONE = Meaning(
    kind="device_lost", what="does not answer",
    remedy="see npu-smi info and dmesg; the driver may need `npu-smi set -t reset -i ID -c 0`, then restart the engine",
)  # fmt: skip

CODES: dict[int, Meaning] = {
    107001: Meaning(
        kind="configuration", what="is not there under this number",
        remedy="see `anychip devices` and ASCEND_RT_VISIBLE_DEVICES",
    ),
    107002: Meaning(
        kind="configuration", what="has no context in the thread that called it",
        remedy="report this to anychip: a thread used the device before Platform was opened in it",
    ),
    107020: _HANG,
    **dict.fromkeys((107024, 107025, 107030, 107031, 107040, 107041, 507903), _CAPTURE),
    207001: OUT_OF_MEMORY,
    207004: Meaning(
        kind="configuration", what="is not visible to the process",
        remedy="see ASCEND_RT_VISIBLE_DEVICES; in a container, pass /dev/davinci* and /dev/davinci_manager",
    ),
    207006: Meaning(
        kind="configuration", what="may not be used by this user",
        remedy="add the user to the group HwHiAiUser, or fix the modes of /dev/davinci*",
    ),
    207008: _STREAMS,
    207018: OUT_OF_MEMORY,
    507008: Meaning(
        kind="configuration", what="is another chip than CANN's kernels were installed for",
        remedy="install CANN's kernels package for this chip (Ascend-cann-kernels-CHIP)",
    ),
    507010: _GONE,
    **dict.fromkeys((507014, 507017, 507034, 507046, 507047, 507048), _HANG),
    **dict.fromkeys((507011, 507015, 507016, 507018, 507035, 507036, 507042, 507043, 507044, 507045, 507049), _CRASH),
    507033: _GONE,
    **dict.fromkeys((507053, 507054, 507055), _ECC),
    **dict.fromkeys((507056, 507057, 507904), _PEERS),
    507899: _GONE,
    507901: _GONE,
    **dict.fromkeys((161001, 161002, 561002, 561003), _REFUSED),
}  # fmt: skip
"""By error code."""

_WORDS: tuple[tuple[re.Pattern[str], Meaning], ...] = (
    (re.compile(r"NPU out of memory|\bEL0004\b"), OUT_OF_MEMORY),
    (re.compile(r"stream resources are insufficient|insufficient_stream_resources|alloc sq cq fail", re.I), _STREAMS),
    (re.compile(r"HBM MULTI BIT ECC ERROR|UCE ERROR|SUSPECT MEM ERROR"), _ECC),
    (re.compile(r"(?:HCCS|UB) LINK ERROR|SUSPECT REMOTE ERROR|HCCL function error|\bE[IJ]\d{4}\b"), _PEERS),
    (re.compile(r"FORCE STOP"), Meaning(kind="stopped", what="was told to stop", remedy=_RESTART)),
)  # fmt: skip
"""What messages say where they carry no code that is listed. `EI` and `EJ` are HCCL's."""

_CODE = re.compile(r"(?:error code(?: is)?|ret(?:urn)?(?: code)?|errorCode|errno)\D{0,4}(\d{6})\b", re.I)
_ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


def meaning_of(message: str) -> Meaning | None:
    """None: the message is none of the vendor's that is known."""
    for code in _CODE.findall(message):
        if int(code) in CODES:
            return CODES[int(code)]
    return next((meaning for pattern, meaning in _WORDS if pattern.search(message)), None)


def explained(message: str, device: str, *, free: int | None = None, total: int | None = None) -> DeviceFault | None:
    """A fault for an error's message. `free` and `total` are bytes, said where memory is what is short."""
    meaning = meaning_of(message)
    if meaning is None:
        return None
    asked = _ASKED.search(message)
    if meaning is OUT_OF_MEMORY:
        numbers = f": {asked.group(1)} asked" if asked else ""
        if free is not None and total is not None:
            numbers += f"{',' if asked else ':'} {free / 2**30:.2f} of {total / 2**30:.2f} GiB free"
        return DeviceFault(f"{device} {meaning.what}{numbers}", kind=meaning.kind, fatal=False, remedy=meaning.remedy)
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    what = f"{device} {meaning.what}: {line}"
    return DeviceFault(what, kind=meaning.kind, fatal=meaning.fatal, remedy=meaning.remedy)
