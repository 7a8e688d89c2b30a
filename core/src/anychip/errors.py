"""Every exception that anychip raises on purpose.

    AnychipError
    ├── UserError                  the caller can mend it: HTTP 4xx, exit status 2
    │   ├── InvalidRequest         400, names the parameter
    │   │   └── ContextTooLong
    │   ├── UnknownModel           404
    │   ├── UnknownResponse        404
    │   ├── QueueFull              429
    │   ├── BodyTooLarge           413
    │   ├── RequestTimeout         408, past its deadline
    │   ├── ConfigError            a setting, before anything is loaded
    │   ├── CheckpointError        names the tensor and the file
    │   ├── AdapterRefused         names what of an adapter is not served, or does not fit
    │   ├── KVCacheTooSmall        says what would fit
    │   ├── DeviceUnavailable      a named device that cannot start
    │   └── PortInUse
    ├── PluginError                the vendor can mend it
    │   ├── PluginImportFailed
    │   ├── PluginFailed           a hook raised: names package, hook and cause
    │   ├── IncompatiblePlugin     interface version out of range
    │   ├── InvalidOverride        an op with the wrong name or signature
    │   └── Unsupported            a factory refuses a spec, with every reason
    ├── DeviceFault                the device failed: kind, fatal or not, ranks
    ├── StepFailed                 the step that a request was in failed; the engine goes on
    ├── OutputFailed               a request's tokens could not be made into its answer; others go on
    ├── EngineDead                 503, carries the root cause
    │   └── EngineHung             it made no progress for too long, and was ended
    └── RequestAborted

A message gives the cause, the numbers and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class AnychipError(Exception):
    """Root of the tree."""


class UserError(AnychipError):
    """The caller asked for something that cannot be; nothing was changed."""

    status = 400
    code = "invalid_request"
    param: str | None = None


class InvalidRequest(UserError):
    """A request's value is out of range, of the wrong type or unknown."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    """Prompt and requested tokens do not fit the model's context."""

    code = "context_length_exceeded"


class UnknownModel(UserError):
    """No model of this name is served."""

    status = 404
    code = "model_not_found"
    param = "model"


class UnknownResponse(UserError):
    """No response of this id is kept for whoever asks."""

    status = 404
    code = "response_not_found"


class QueueFull(UserError):
    """As many requests wait as may, or run for one key. `retry_after` in seconds, where it is known."""

    status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BodyTooLarge(UserError):
    """A request's body is longer than one may be."""

    status = 413
    code = "body_too_large"


class RequestTimeout(UserError):
    """The request did not end within the time that it was given."""

    status = 408
    code = "deadline_exceeded"


class ConfigError(UserError):
    """A setting, or a pair of settings, is invalid."""

    code = "invalid_config"


class CheckpointError(UserError):
    """A checkpoint's file or tensor does not fit the model."""

    code = "invalid_checkpoint"


class AdapterRefused(UserError):
    """An adapter is not whole, is of a kind that is not served, or does not fit the model."""

    code = "invalid_adapter"


class KVCacheTooSmall(UserError):
    """The KV cache cannot hold one request of the maximum length."""

    code = "kv_cache_too_small"


class DeviceUnavailable(UserError):
    """The named device cannot start; says why and what to do."""

    code = "device_unavailable"


class PortInUse(UserError):
    """Another process listens on the address."""

    code = "port_in_use"


class PluginError(AnychipError):
    """A plugin package breaks the interface's rules."""


class PluginImportFailed(PluginError):
    """An entry point, a probe or a platform module raised at import."""


class PluginFailed(PluginError):
    """A plugin's code raised what no hook may raise. `package`, `hook` and `cause` say who, where and what."""

    @classmethod
    def of(cls, package: str, hook: str, error: BaseException) -> PluginFailed:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls(
            f"{package}: {hook} raised {text}; report this to the authors of {package.partition(' ')[0]} with the "
            "traceback in the log (ANYCHIP_LOG_LEVEL=debug shows each), or do without it"
        )


class IncompatiblePlugin(PluginError):
    """The plugin was built against an interface version that this core does not speak."""


class InvalidOverride(PluginError):
    """An op override has an unknown name, or a signature that the op's version does not allow."""


class Unsupported(PluginError):
    """A factory cannot serve a spec. `reasons` holds every reason, not only the first."""

    def __init__(self, who: str, reasons: Sequence[str]) -> None:
        self.who = who
        self.reasons = tuple(reasons)
        super().__init__(f"{who}: " + "; ".join(self.reasons))


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """What a DeviceFault carries beside its message, as it crosses processes."""

    kind: str
    fatal: bool
    ranks: tuple[int, ...]


class DeviceFault(AnychipError):
    """The device or its runtime failed.

    `kind` is a word such as "out_of_memory", "illegal_access" or "timeout"; `fatal` says that the process
    cannot go on using the device; `ranks` are those known to be affected.
    """

    def __init__(self, message: str, *, kind: str, fatal: bool, ranks: Sequence[int] = (), remedy: str = "") -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.kind = kind
        self.fatal = fatal
        self.ranks = tuple(ranks)
        self.remedy = remedy

    @property
    def crossing(self) -> Fault:
        """What another process must know beside the message."""
        return Fault(self.kind, self.fatal, self.ranks)


class StepFailed(AnychipError):
    """The device could not do the step that the request was in, and can do others: it was short of memory, say."""


class OutputFailed(AnychipError):
    """The tokens of a request could not be made into its answer. The request was ended, and others go on."""


class EngineDead(AnychipError):
    """The engine stopped; the message carries the root cause."""


class EngineHung(EngineDead):
    """The engine, or a worker of its, made no progress for longer than it may."""


class RequestAborted(AnychipError):
    """The request was aborted before it finished."""


_BY_NAME: dict[str, type[AnychipError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest, ContextTooLong, UnknownModel, QueueFull, RequestTimeout, ConfigError, CheckpointError,
        AdapterRefused,
        KVCacheTooSmall, DeviceUnavailable, PortInUse, PluginImportFailed, PluginFailed, IncompatiblePlugin,
        InvalidOverride, StepFailed, OutputFailed, EngineHung,
    )
}  # fmt: skip


def fault_of(error: BaseException) -> Fault | None:
    """What `rebuild` needs beside class name and message."""
    return error.crossing if isinstance(error, DeviceFault) else None


def rebuild(name: str, message: str, fault: Fault | None = None) -> AnychipError:
    """The error that another process reported by class name and message; EngineDead if the name is unknown."""
    if fault is not None:
        return DeviceFault(message, kind=fault.kind, fatal=fault.fatal, ranks=fault.ranks)
    if name in _BY_NAME:
        return _BY_NAME[name](message)
    if name == "Unsupported":
        who, _, reasons = message.partition(": ")
        return Unsupported(who, [reasons])
    return EngineDead(message if name == "EngineDead" else f"{name}: {message}")
