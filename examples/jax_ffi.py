"""A kernel inside jax.jit: RMSNorm as a foreign function of XLA, on the CPU or on a GPU.

    pip install 'minitron_kernels[jax]'
    python jax_ffi.py

jax_rms_norm.cpp puts the C ABI behind XLA's FFI; g++ compiles it with the headers of both packages.
Outside of jit, `minitron_kernels.dlpack` takes JAX arrays as they are, without a compiler.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import minitron_kernels

SOURCE = Path(__file__).with_name("jax_rms_norm.cpp")
TARGET = "minitron_rms_norm"


def register(folder: Path) -> None:
    """Compile the handlers into a library in ``folder``, and make them known to XLA."""
    kernels = Path(minitron_kernels.get_library())
    library = folder / "libjax_rms_norm.so"
    includes = [f"-I{minitron_kernels.get_include()}", f"-isystem{jax.ffi.include_dir()}"]
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", *includes, str(SOURCE), str(kernels)]
    subprocess.run([*command, f"-Wl,-rpath,{kernels.parent}", "-o", str(library)], check=True)
    handlers = ctypes.CDLL(str(library))
    for platform in ("cpu", "CUDA"):
        handler = getattr(handlers, f"minitron_rms_norm_{platform.lower()}")
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform=platform)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-5) -> jax.Array:
    """x / rms(x) * weight over the last dimension; x [..., H], weight [H] of one dtype."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")
    return call(x, weight, eps=np.float32(eps))


def plain_rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-5) -> jax.Array:
    """The same, as Hugging Face's models round it, by XLA."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        register(Path(folder))
    keys = jax.random.split(jax.random.key(0), 2)
    is_good = True
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        x = jax.random.normal(keys[0], (4, 7, 576)).astype(dtype)
        weight = jax.random.normal(keys[1], (576,)).astype(dtype)
        x64, weight64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
        exact = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-5) * weight64
        limits = jnp.finfo(dtype)
        unit = float(limits.eps) * np.maximum(np.abs(exact), float(limits.smallest_normal))

        errors = [
            float(np.max(np.abs(np.asarray(function(x, weight), np.float64) - exact) / unit))
            for function in (plain_rms_norm, rms_norm, jax.jit(rms_norm))
        ]
        rows = jax.vmap(rms_norm, (0, None))(x, weight)
        is_good &= max(errors[1:]) <= errors[0] + 1 and bool(jnp.all(rows == rms_norm(x, weight)))
        print(f"{jnp.dtype(dtype).name}: error {errors[1]:.2f} units, XLA's own {errors[0]:.2f}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
