"""minitron_kernels as a kernel of the Hugging Face Hub: `layers`, over the package beside them.

The package keeps its name: its compiled parts exist once in a process. One that was imported before
is used if it is of the same version; another version is an ImportError.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def _load_package() -> None:
    version = (_HERE / "VERSION").read_text().strip()
    if "minitron_kernels" in sys.modules:
        try:
            found = importlib.metadata.version("minitron_kernels")
        except importlib.metadata.PackageNotFoundError:
            return  # a source tree
        if found != version:
            raise ImportError(
                f"minitron_kernels {found} is imported already, and this kernel is {version}"
            )
        return
    package = _HERE / "minitron_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location("minitron_kernels", package)
    module = importlib.util.module_from_spec(spec)
    sys.modules["minitron_kernels"] = module
    spec.loader.exec_module(module)


_load_package()

from . import layers  # noqa: E402

__all__ = ["layers"]
