"""The sockets between the API process and the engine process: Unix sockets in a private folder, msgspec frames."""

from __future__ import annotations

from pathlib import Path

import msgspec

from anychip.messages import FromEngine, ToEngine

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def request_endpoint(folder: Path) -> str:
    return f"ipc://{folder}/requests"


def output_endpoint(folder: Path) -> str:
    return f"ipc://{folder}/outputs"
