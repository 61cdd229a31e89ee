"""Builds the native CPU path with torch's extension tools; everything else about the package is in pyproject.toml.

CONSPO_BUILD says what is built:

    auto (default)   the CPU extension where torch, a C++ compiler and Python's headers are found; else a pure Python
                     package, and why
    cpu              the CPU extension, or fail
    none             a pure Python package

CONSPO_WERROR=1 makes a warning of the compiler an error; CFLAGS would do the same, to every other package too that pip
compiles on the way.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

# The first that knows the licence as pyproject.toml has it. Where the build is not isolated, nobody else asks.
OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(f"conspo_kernels needs setuptools >= {OLDEST_SETUPTOOLS} to be built, this is {setuptools.__version__}")

ROOT = Path(__file__).resolve().parent
NOTE = "conspo_kernels/not_built.txt"
CHOICES = ("auto", "cpu", "none")
COMPILERS = ("c++", "g++", "clang++")  # where CXX names none: what torch takes, and what it may be called else

# OpenMP is what ATen's at::parallel_for is made of; the run-time library is the one that torch has loaded already.
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]

PYTHON_HEADERS = (
    "the headers of this Python are missing: Debian and Ubuntu have them in python3-dev, Fedora in python3-devel"
)

# What a C++ compiler may lack, by the header that it does not find then.
MISSING = {
    "Python.h": PYTHON_HEADERS,
    "pyconfig.h": PYTHON_HEADERS,
    "omp.h": "the compiler has no OpenMP: Debian and Ubuntu have Clang's in libomp-dev",
    "vector": "the compiler has no C++ standard library: Debian and Ubuntu have it in g++",
}


def extension_tools():
    """torch.utils.cpp_extension of the torch that will load the extension.

    pip builds in an environment of its own, without torch; the one to build against is in the environment around it.
    """
    try:
        from torch.utils import cpp_extension
    except ImportError:
        sys.path += dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        from torch.utils import cpp_extension
    return cpp_extension


def without_blank_variables():
    """A variable that is set to nothing is not set; torch and setuptools would run a compiler without a name."""
    for name in ("CXX", "CC", "LDSHARED", "LDCXXSHARED", "AR", "CONSPO_BUILD"):
        if not os.environ.get(name, "set").strip():
            del os.environ[name]


def obstacle():
    """Why the extension cannot be built here, or None."""
    if platform.system() == "Windows":
        return "the sources want GCC or Clang"
    if "CXX" not in os.environ:
        found = next((name for name in COMPILERS if shutil.which(name)), None)
        if found is None:
            return f"no C++ compiler: {', '.join(COMPILERS[:-1])} and {COMPILERS[-1]} are not on the path"
        os.environ["CXX"] = found  # torch would run c++ whether it is there or not
    compiler = shlex.split(os.environ["CXX"])
    if not shutil.which(compiler[0]):
        return f"no C++ compiler: {compiler[0]}, which CXX names, is not on the path"
    reason = obstacle_of_compiler(compiler)
    if reason is not None:
        return reason
    try:
        extension_tools()
    except ImportError as error:
        return f"torch, which the extension is built against, is not in this environment ({error}): install it first"
    return None


def obstacle_of_compiler(compiler):
    """What the compiler cannot find of what every source includes, or None. Takes a fraction of a second."""
    folders = dict.fromkeys([sysconfig.get_path("include"), sysconfig.get_path("platinclude"), f"{sys.prefix}/include"])
    flags = [flag for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    headers = ["vector", "Python.h", *(["omp.h"] if OPENMP else [])]
    command = [*compiler, *flags, *(f"-I{folder}" for folder in folders), *OPENMP, "-fsyntax-only", "-x", "c++", "-"]
    source = "".join(f"#include <{header}>\n" for header in headers)
    result = subprocess.run(
        command, input=source, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False
    )
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
    first = errors[0].strip() if errors else f"exit status {result.returncode}"
    for header, reason in MISSING.items():
        if f"{header}: No such file" in first or f"{header}' file not found" in first:  # GCC's words, and Clang's
            return f"{reason} ({header})"
    return f"the C++ compiler {shlex.join(compiler)} does not compile three lines: {first}"


def extension():
    """What setuptools needs to build conspo_kernels._C."""
    cpp_extension = extension_tools()
    sources = ["csrc/module.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))]
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    # As system headers, torch's own warnings are not ours.
    system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    warnings = ["-Wall", "-Wextra", *system]
    # The exponential counts on a * b + c being rounded once where the CPU can; no NaN or order of sums is given up.
    arithmetic = ["-ffp-contract=fast", "-fno-math-errno"]
    if os.environ.get("CONSPO_WERROR", "0") not in ("", "0"):
        warnings.append("-Werror")
    # Python's own flags ask for debug information: a quarter of the compiler's time and nine tenths of the file.
    debug = [] if "-g" in shlex.split(os.environ.get("CFLAGS", "")) else ["-g0"]
    return {
        "ext_modules": [
            cpp_extension.CppExtension(
                "conspo_kernels._C",
                sources,
                depends=headers,
                extra_compile_args=["-O3", "-fvisibility=hidden", *debug, *arithmetic, *warnings, *OPENMP],
                extra_link_args=OPENMP,
            )
        ],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=bool(shutil.which("ninja")))},
    }


def without_extension(reason):
    """A pure Python package that knows why it is one: `python -m conspo_kernels info` says it."""

    class BuildWithNote(build_py):
        def run(self):
            super().run()
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            (folder / NOTE).parent.mkdir(parents=True, exist_ok=True)
            (folder / NOTE).write_text(reason, encoding="utf-8")

    print(f"conspo_kernels: the CPU extension is NOT built: {reason}", file=sys.stderr)
    return {"cmdclass": {"build_py": BuildWithNote}}


def options():
    without_blank_variables()
    wanted = os.environ.get("CONSPO_BUILD", "auto")
    if wanted not in CHOICES:
        sys.exit(f"CONSPO_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "none":
        return without_extension("CONSPO_BUILD=none, when it was installed")
    reason = obstacle()
    if reason is None:
        return extension()
    if wanted == "cpu":
        sys.exit(f"CONSPO_BUILD=cpu: the CPU extension cannot be built: {reason}")
    return without_extension(reason)


setup(**options())
