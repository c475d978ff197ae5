"""Pickling of transformers' models, for worker processes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

# transformers records hidden states with hooks that it installs at the first call and that cannot be pickled. It
# installs them again where they are missing.
_RECORDER, _INSTALLED = "transformers.utils.output_capturing", "_output_capturing_hooks_installed"


def picklable_state(self: nn.Module) -> dict[str, Any]:
    """`__getstate__` of a module that contains transformers' models: their recording hooks are left out."""
    return _without_recorders(self).__dict__


def _without_recorders(module: nn.Module) -> nn.Module:
    plain = module.__new__(type(module))
    plain.__dict__.update(module.__dict__)
    hooks = {key: hook for key, hook in module._forward_hooks.items() if hook.__module__ != _RECORDER}
    plain.__dict__["_forward_hooks"] = OrderedDict(hooks)
    plain.__dict__.pop(_INSTALLED, None)
    plain.__dict__["_modules"] = {n: None if m is None else _without_recorders(m) for n, m in module._modules.items()}
    return plain
