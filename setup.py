"""Only the native kernels; everything else is in pyproject.toml.

They are compiled into the package where a C++ compiler is there. Without one, and when it fails, the package is
installed without them: ``moeify build-kernels`` makes them later. ``MOEIFY_NO_KERNELS=1`` leaves them out.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_FOLDER = Path(__file__).parent / "backends" / "onnxruntime"
_NAME = "moeify.backends.onnxruntime.native.moeify_kernels"


def _compile_module():
    """moeify.backends.onnxruntime.kernel_compile, which the package cannot be asked for before it is installed."""
    spec = importlib.util.spec_from_file_location("kernel_compile", _FOLDER / "kernel_compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Each source with its own machine flags, which setuptools cannot say."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], _compile_module().LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        module = _compile_module()
        compiler = module.find_compiler()
        if compiler is None or os.environ.get("MOEIFY_NO_KERNELS"):
            self.warn("the native kernels are left out")
            return
        try:
            module.compile_library(compiler, Path(self.get_ext_fullpath(ext.name)))
        except (module.CompileFailed, OSError) as error:
            self.warn(f"the native kernels do not compile and are left out: {error}")

    def copy_extensions_to_source(self) -> None:
        """Not in an editable install: a library in the source tree would be of other sources after the next edit."""

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension(_NAME, sources=[])], cmdclass={"build_ext": BuildKernels})
