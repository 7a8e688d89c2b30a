"""What the routes of every API work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from anychip.chat.parsers.registry import ChosenParsers, choose_parsers
from anychip.engine.input_processor import RequestOptions
from anychip.entrypoints.http.keys import NOBODY, Keys
from anychip.errors import InvalidRequest, UnknownModel
from anychip.launch.async_llm import AsyncLLM
from anychip.registry.plugins import load_plugins
from anychip.sampling_params import SamplingParams
from anychip.server_config import ServerConfig
from anychip.tasks.detect import refusal

MAX_PRIORITY = 2**31 - 1

_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's makers may have recommended values for."""

_MAX_SHOWN = 200
_MAX_NAMES = 20
_TRACE_HEADERS = ("traceparent", "tracestate")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose a request is, and the trace that it is part of."""

    tenant: str = NOBODY
    trace_headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request) -> Caller:
        found = {name: value for name in _TRACE_HEADERS if (value := request.headers.get(name)) is not None}
        return cls(request.state.tenant, found)


def sampling_params(body: object, defaults: Mapping[str, float], **asked: Any) -> SamplingParams:
    """What any API's body asks for: `defaults` where it leaves out what the model's makers recommend. Raises
    InvalidRequest for a value out of range."""
    given = {name: value for name in _RECOMMENDED if (value := getattr(body, name, None)) is not None}
    if given.get("top_k") == -1:  # vLLM's word for no limit
        given["top_k"] = 0
    return SamplingParams(**{**defaults, **given}, **asked)


@dataclass(frozen=True, slots=True)
class AskedModel:
    """What a request's `model` names: the model itself, or an adapter of it by the digest that the name has now."""

    name: str
    adapter: bytes | None = None


@dataclass(slots=True)
class Serving:
    """A started engine and how it is served."""

    llm: AsyncLLM
    config: ServerConfig
    parsers: ChosenParsers
    keys: Keys

    @classmethod
    def of(cls, llm: AsyncLLM, config: ServerConfig | None = None) -> Serving:
        """Raises ConfigError for parsers and keys that cannot be."""
        config = config or ServerConfig()
        template = None if llm.tokenizer is None or llm.tokenizer.chat_template is None else llm.tokenizer.chat_template
        source = None if template is None else template.source
        return cls(
            llm=llm,
            config=config,
            parsers=choose_parsers(config.tool_parser, config.reasoning_parser, source, load_plugins().parsers),
            keys=Keys.of(config.api_key, config.api_keys, config.key_concurrency),
        )

    @property
    def model(self) -> str:
        """What clients call the model."""
        return self.llm.config.public_name

    def check_model(self, model: str | None) -> AskedModel:
        """Raises UnknownModel."""
        if model is None or model == self.model:
            return AskedModel(self.model)
        adapter = self.llm.adapters.names.get(model)
        if adapter is None:
            names = [self.model, *(each.name for each in self.llm.adapters.names)]
            served = ", ".join(repr(name) for name in names[:_MAX_NAMES]) + (", ..." if names[_MAX_NAMES:] else "")
            raise UnknownModel(f"model {model[:_MAX_SHOWN]!r} does not exist; this server serves {served}")
        return AskedModel(adapter.name, adapter.digest)

    def check_draws(self) -> None:
        """Raises InvalidRequest where the model gives vectors and no text."""
        served = self.llm.served
        if not served.draws:
            raise InvalidRequest(refusal(served, "text"), param="model")

    def options(self, caller: Caller, deadline: float | None, **more: object) -> RequestOptions:
        """Of a request by a key's holder. Raises InvalidRequest."""
        priority = more.get("priority", 0)
        if not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise InvalidRequest(
                f"priority is {str(priority)[:40]}; expected {-MAX_PRIORITY} to {MAX_PRIORITY}", param="priority"
            )
        if deadline is not None and not 0 < deadline < float("inf"):
            raise InvalidRequest(f"deadline is {deadline}; expected seconds above 0", param="deadline")
        limits = [limit for limit in (deadline, self.config.request_timeout_s) if limit is not None]
        return RequestOptions(
            tenant=caller.tenant,
            trace_headers=caller.trace_headers,
            deadline=min(limits, default=None),
            **more,  # type: ignore[arg-type]
        )
