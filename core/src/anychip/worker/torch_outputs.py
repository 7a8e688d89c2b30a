"""What a step of the torch seam produced, on its way to the host."""

from __future__ import annotations

from torch import Tensor

from anychip.plugin_api import Event, HostOutputs, Scores

SCORE_NAMES = ("scores", "score_ids", "score_tops")


class TorchOutputs:
    """plugin_api.StepOutputs: host tensors that are being filled, and the event after which they are."""

    def __init__(self, host: dict[str, Tensor], event: Event) -> None:
        self._host = host
        self._event = event

    def fetch(self) -> HostOutputs:
        self._event.wait()
        arrays = {name: tensor.numpy() for name, tensor in self._host.items()}
        scores = None
        if SCORE_NAMES[0] in arrays:
            logprobs, top_ids, top = (arrays.pop(name) for name in SCORE_NAMES)
            scores = Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)
        return HostOutputs(**arrays, scores=scores)
