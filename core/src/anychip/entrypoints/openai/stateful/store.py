"""Responses that may be asked for again or continued, in memory: the oldest go when there are too many."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from anychip.entrypoints.http.long_json import encoded

MAX_RESPONSES = 4096
MAX_BYTES = 128 * 2**20


@dataclass(slots=True)
class Stored:
    """`messages` are the whole conversation, the answer included. Only `tenant` may see it."""

    tenant: str
    response: dict[str, Any]
    messages: list[dict[str, Any]]
    input_items: list[dict[str, Any]]
    nbytes: int = 0


class ResponseStore:
    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self.nbytes = 0

    def put(self, entry: Stored) -> None:
        entry.nbytes = sum(map(len, encoded((entry.response, entry.messages, entry.input_items))))
        self._stored[entry.response["id"]] = entry
        self.nbytes += entry.nbytes
        while len(self._stored) > self._max_responses or self.nbytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def get(self, response_id: str, tenant: str) -> Stored | None:
        found = self._stored.get(response_id)
        return found if found is not None and found.tenant == tenant else None

    def delete(self, response_id: str, tenant: str) -> bool:
        if self.get(response_id, tenant) is None:
            return False
        self.nbytes -= self._stored.pop(response_id).nbytes
        return True
