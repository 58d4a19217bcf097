"""Runs CMake; what is built, and how, is in CMakeLists.txt."""

import os
import shlex
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        root = Path(__file__).resolve().parent
        torch = find_spec("torch")
        if torch is None or torch.origin is None:
            raise RuntimeError("building fused_ce needs torch (its headers and libraries)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(root), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DFUSED_CE_TORCH_DIR={Path(torch.origin).parent}"]
        configure += [f"-DFUSED_CE_PYTHON_INCLUDE={sysconfig.get_paths()['include']}"]
        configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        # Said each time, since CMake would go on with the option of the build before.
        configure += ["-DFUSED_CE_CUDA=AUTO"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("fused_ce._C", [], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
