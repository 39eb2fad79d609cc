"""vLLM: layers, an attention backend and GGUF weights, by its plugin entry point.

vLLM calls `register` in each of its processes. What then uses the kernels:

- RMSNorm, SiluAndMul and RotaryEmbedding, where vLLM's custom_ops enable them;
- attention, with ``--attention-backend MINITRON``;
- GGUF files of Llama's architecture, with ``--load-format minitron_gguf`` and
  ``--config-format minitron_gguf``.

docs/integrations.md has the commands. `paged.py` and `matrices.py` do the work and know no vLLM;
`layers.py`, `attention.py` (by `registry.py`) and `gguf.py` are vLLM's classes around it.
"""

from __future__ import annotations

import importlib
import logging

_log = logging.getLogger(__name__)

BACKEND = "MINITRON"  # of attention
GGUF = "minitron_gguf"  # load format, config format and quantisation
ARCHITECTURE = "MinitronForCausalLM"

_PARTS = ("registry", "layers", "gguf")


def unsupported() -> str | None:
    """Why the kernels cannot serve this vLLM: None if they can. Initialises no CUDA context."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    if not current_platform.is_cuda():
        return f"they run on NVIDIA GPUs and CPUs, not on {current_platform.device_name or 'this'}"
    capability = current_platform.get_device_capability()
    if capability is None:
        return "no GPU was found"
    from minitron_kernels import _native

    try:
        _native.kernels_for(capability.major, capability.minor)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    return None


def register() -> None:
    """Register everything with vLLM, once; never raises. What cannot be is logged with the reason.

    The entry point vllm.general_plugins.
    """
    try:
        reason = unsupported()
    except Exception as error:  # a vLLM of other insides goes on without the kernels
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        _log.warning("minitron_kernels are not used in this vLLM: %s", reason)
        return
    for part in _PARTS:
        try:
            importlib.import_module(f"{__name__}.{part}").register()
        except Exception as error:
            _log.warning(
                "minitron_kernels: %s is not registered with this vLLM: %s: %s",
                part,
                type(error).__name__,
                error,
            )
