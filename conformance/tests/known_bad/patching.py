"""Replaces a function of core and one of torch while it is imported."""

import torch

from anychip.ops import reference
from anychip.plugin_api import Platform


def rms_norm(*, x, weight, eps, unit_offset=False):
    return x


def softmax(*arguments, **keywords):
    return torch.softmax(*arguments, **keywords)


reference.functional.rms_norm = rms_norm
torch.nn.functional.softmax = softmax


class BadPlatform(Platform):
    pass
