"""Traces of parts, each made once in a process: PyTorch takes a second for one, and looks at none of a checkpoint's weights.

For tests of what comes before and behind a trace: the files of a checkpoint, its weights, quantization, what a failure leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["remembering", "traced_once"]

#: Entries of a configuration that say where a checkpoint lies and how its weights are stored.
_STORAGE = {"_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version"}
_traces: dict[str, Any] = {}


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Exports in here trace only what nothing else in this process has traced in here before."""
    from edgevlm.export import trace

    real = trace.trace_part
    trace.trace_part = remembering(real)
    try:
        yield
    finally:
        trace.trace_part = real


def remembering(trace_part: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`trace_part`, with what it made kept."""

    def traced(fake: Any, spec: Any) -> Any:
        key = _key(fake, spec)
        if key not in _traces:
            _traces[key] = trace_part(fake, spec)
        return _traces[key].clone()

    return traced


def _key(fake: Any, spec: Any) -> str:
    """All that a trace depends on: the modules, their settings, the constants, and what the parameters are called."""
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (tuple(value.shape), str(value.dtype), hashlib.sha256(_bytes(value)).hexdigest())
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__

    modules = [
        (name, type(module).__qualname__, {k: plain(v) for k, v in sorted(vars(module).items()) if not k.startswith("_")})
        for name, module in spec.module.named_modules()
    ]
    parameters = [
        (name, fake.names[id(p)], tuple(p.shape), str(p.dtype))
        for name, p in spec.module.named_parameters(remove_duplicate=False)
    ]
    buffers = [(name, plain(buffer)) for name, buffer in spec.module.named_buffers(remove_duplicate=False)]
    config = fake.model.config
    said = json.dumps(_without_storage(config.to_dict() if hasattr(config, "to_dict") else vars(config)), default=vars)
    return repr((spec.name, spec.inputs, spec.outputs, repr(spec.module), modules, parameters, buffers, said))


def _bytes(tensor: Any) -> bytes:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _without_storage(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {str(key): _without_storage(value) for key, value in entry.items() if key not in _STORAGE}
    return [_without_storage(value) for value in entry] if isinstance(entry, (list, tuple)) else entry
