"""Where ranks of several hosts meet before they talk to each other: values by name, for whoever has the cluster's key.
Does not wait: a rank that needs a value asks again."""

from __future__ import annotations

import msgspec

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[tuple[str, str, bytes]] = msgspec.msgpack.Decoder(tuple[str, str, bytes])


class Meeting:
    """A request is (operation, name, value); its answer is bytes, or None where there is no such value."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def answer(self, frame: bytes) -> bytes:
        """Raises msgspec.MsgspecError or ValueError for a frame that is no request."""
        operation, name, value = _requests.decode(frame)
        values = self._values
        if operation == "set":
            values[name] = value
        elif operation == "add":  # as torch's stores have it: a number in ASCII
            values[name] = str(int(values.get(name, b"0")) + int(value)).encode()
        elif operation == "delete":
            return _encoder.encode(values.pop(name, None))
        elif operation != "get":
            raise ValueError(f"operation {operation[:40]!r}; known are set, add, delete and get")
        return _encoder.encode(values.get(name))
