"""examples/jax_ffi.py: a kernel inside jax.jit, compiled against JAX's headers and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import jax, jax.numpy as jnp, jax_ffi
print("status", jax_ffi.main())
for x, weight in (
    (jnp.ones((2, 8)), jnp.ones(4)),
    (jnp.ones((2, 8)), jnp.ones(8, jnp.bfloat16)),
    (jnp.ones((2, 8), jnp.int32), jnp.ones(8, jnp.int32)),
):
    try:
        jax.jit(jax_ffi.rms_norm)(x, weight).block_until_ready()
        print("no error")
    except Exception as error:
        print(str(error).splitlines()[0])
"""


def test_jax_example() -> None:
    """Its own comparison with float64 and XLA; and what does not fit is an error that says so."""
    pytest.importorskip("jax", reason="jax is not installed (extra jax)")
    path = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    *compared, status, first, second, third = done.stdout.splitlines()
    assert [line.split(":")[0] for line in compared] == ["bfloat16", "float16", "float32"]
    assert status == "status 0", compared
    assert "weight: must be [H]" in first and "weight: must be [H]" in second
    assert "x: bfloat16, float16 or float32" in third
