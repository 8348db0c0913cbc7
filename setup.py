"""Builds the compiled module ``entropic_fast._C``; everything else is in pyproject.toml.

The module includes no torch header, so one build serves every torch version and the build needs
only setuptools and pybind11. ``csrc/cpu/simd/*.cpp`` is compiled once for each instruction set and
chosen from at run time; ``csrc/cuda/*.cu`` is compiled when a CUDA compiler is found, whether or
not a GPU is present. ``ENTROPIC_FAST_CUDA=0`` leaves CUDA out, ``ENTROPIC_FAST_CUDA=1`` insists.
``ENTROPIC_FAST_ISAS=portable,avx2`` builds for these instruction sets alone, "portable" among them.
``ENTROPIC_FAST_SANITIZE=address,undefined`` builds with those of GCC's sanitizers, for tests.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LINUX = sys.platform.startswith("linux")

# sm_90 came with CUDA 11.8.
OLDEST_NVCC = (11, 8)
CUDA_ARCHS = ("80", "90")

# No -ffast-math: sums keep their order. No contraction: every instruction set gives the same bits,
# except in the families below, which live on fused multiply-adds.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",
    "-Wall",
    "-Wextra",
]
# Registers wider than the baseline's never cross a translation unit here, so GCC's remark about
# their calling convention does not apply.
SIMD_FLAGS = ["-Wno-psabi"]
FUSED_FLAGS = ["-ffp-contract=fast"]
FUSED = ("score_", "jet", "langevin")  # csrc/cpu/simd/ files whose names begin so
OPENMP_FLAGS = ["-fopenmp"] if LINUX else []

SANITIZERS = ("address", "undefined", "thread")

ISA_FLAGS: dict[str, list[str]] = {"portable": []}
if LINUX and platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512",
    ]  # fmt: skip


class BuildError(RuntimeError):
    """The build cannot do what the environment asks for."""


@dataclass(frozen=True)
class Nvcc:
    path: str
    version: tuple[int, int]
    library_dirs: list[str]


def find_nvcc() -> tuple[Nvcc | None, str]:
    """The CUDA compiler and where it was found, or None and what was looked for."""
    candidates: list[tuple[str, str | None]] = []
    home = os.environ.get("CUDA_HOME")
    candidates.append(("$CUDA_HOME/bin/nvcc", os.path.join(home, "bin", "nvcc") if home else None))
    candidates.append(("/usr/local/cuda/bin/nvcc", "/usr/local/cuda/bin/nvcc"))
    candidates.append(("nvcc on PATH", shutil.which("nvcc")))
    looked = []
    for label, path in candidates:
        if path is None:
            looked.append(f"{label} (not set)" if "HOME" in label else f"{label} (none)")
        elif not os.access(path, os.X_OK):
            looked.append(f"{label} (no such program)")
        else:
            nvcc, problem = inspect_nvcc(path)
            if nvcc is not None:
                return nvcc, f"{path}, release {nvcc.version[0]}.{nvcc.version[1]}"
            looked.append(f"{path} ({problem})")
    return None, "looked for " + ", ".join(looked)


def inspect_nvcc(path: str) -> tuple[Nvcc | None, str]:
    """Asks the compiler itself for its release and library folders: it may be a wrapper script."""
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        # A dry run names a file but neither opens nor writes it.
        dry = subprocess.run(
            [path, "--dryrun", "probe.cu"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    if release is None:
        return None, "does not name its release"
    number = (int(release[1]), int(release[2]))
    if number < OLDEST_NVCC:
        return None, f"release {number[0]}.{number[1]} is older than 11.8 and cannot target sm_90"
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
    found = re.findall(r'"?-L([^"\s]+)"?', libraries[1]) if libraries else []
    dirs = [d for d in found if os.path.exists(os.path.join(d, "libcudart_static.a"))]
    if not dirs:
        return None, "names no folder that holds libcudart_static.a"
    return Nvcc(path, number, dirs), ""


def choose_cuda() -> tuple[Nvcc | None, str]:
    wish = os.environ.get("ENTROPIC_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"ENTROPIC_FAST_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "left out: ENTROPIC_FAST_CUDA=0"
    if not LINUX:
        nvcc, story = None, f"CUDA is built on Linux only, this is {sys.platform}"
    else:
        nvcc, story = find_nvcc()
    if wish == "1" and nvcc is None:
        raise BuildError(
            f"ENTROPIC_FAST_CUDA=1 but no usable CUDA compiler: {story}. Install the CUDA toolkit "
            "(11.8 or newer), point CUDA_HOME at it, or unset ENTROPIC_FAST_CUDA for a CPU build."
        )
    return nvcc, story


def listed(variable: str, known: Iterable[str]) -> list[str]:
    """What an environment variable lists, of what is known; nothing if it is not set."""
    wish = os.environ.get(variable, "")
    names = [name for name in wish.split(",") if name]
    if not set(names) <= set(known):
        raise BuildError(f"{variable} must list some of {', '.join(known)}, got {wish!r}")
    return names


def chosen_isas() -> dict[str, list[str]]:
    """Flags of the instruction sets to build for."""
    names = listed("ENTROPIC_FAST_ISAS", ISA_FLAGS) or list(ISA_FLAGS)
    if "portable" not in names:
        raise BuildError("ENTROPIC_FAST_ISAS must list portable, which every machine can run")
    return {name: ISA_FLAGS[name] for name in names}


def sanitizer_flags() -> list[str]:
    """Flags for compiler and linker; a finding ends the process."""
    names = listed("ENTROPIC_FAST_SANITIZE", SANITIZERS)
    flags = [f"-fsanitize={name}" for name in names]
    # Without -O1 the compiler takes many minutes for the unrolled loops of one file.
    extra = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    return [*flags, *extra] if names else []


class BuildExt(build_ext):
    """Adds per-instruction-set compilation and nvcc to the ordinary extension build."""

    def build_extension(self, ext: Extension) -> None:
        ext.extra_compile_args = [*ext.extra_compile_args, *sanitizer_flags()]
        ext.extra_link_args = [*ext.extra_link_args, *sanitizer_flags()]
        nvcc, story = choose_cuda()
        print(f"entropic_fast: CUDA {'from ' if nvcc else 'not built: '}{story}", flush=True)
        isas = chosen_isas()
        archs = "sm_80 sm_90 compute_90" if nvcc else ""
        macros: list[tuple[str, str | None]] = [
            ("ENTROPIC_ISAS", f'"{" ".join(isas)}"'),
            ("ENTROPIC_CUDA_STORY", '"' + story.replace('"', "'").replace("\\", "/") + '"'),
            ("ENTROPIC_CUDA_ARCHS", f'"{archs}"'),
        ]
        macros += [(f"ENTROPIC_HAS_{isa.upper()}", None) for isa in isas]
        if nvcc is not None:
            macros.append(("ENTROPIC_HAS_CUDA", None))
            ext.library_dirs = [*ext.library_dirs, *nvcc.library_dirs]
            # The runtime is linked statically and opens the driver when first called, so the
            # module imports on a machine that has none.
            ext.libraries = [*ext.libraries, "cudart_static", "dl", "rt", "pthread"]
        ext.define_macros = [*ext.define_macros, *macros]

        jobs = []
        for source in sorted(glob("csrc/cpu/simd/*.cpp")):
            for isa, flags in isas.items():
                jobs.append((self.compile_simd, ext, source, isa, flags))
        for source in sorted(glob("csrc/cuda/*.cu")) if nvcc else []:
            jobs.append((self.compile_cuda, nvcc, source))
        for source in ext.sources:
            jobs.append((self.compile_plain, ext, source))
        with ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda job: job[0](*job[1:]), jobs))

        ext.extra_objects = [*ext.extra_objects, *objects]
        ext.sources = []
        super().build_extension(ext)

    def compile_plain(self, ext: Extension, source: str) -> str:
        return self.compile_cpp(ext, source, self.build_temp, [])

    def compile_simd(self, ext: Extension, source: str, isa: str, flags: list[str]) -> str:
        folder = os.path.join(self.build_temp, isa)
        fused = FUSED_FLAGS if Path(source).name.startswith(FUSED) else []
        flags = [f"-DENTROPIC_ISA={isa}", *SIMD_FLAGS, *fused, *flags]
        return self.compile_cpp(ext, source, folder, flags)

    def compile_cpp(self, ext: Extension, source: str, folder: str, flags: list[str]) -> str:
        [output] = self.compiler.compile(
            [source],
            output_dir=folder,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *flags],
        )
        return output

    def compile_cuda(self, nvcc: Nvcc, source: str) -> str:
        output = os.path.join(self.build_temp, "cuda", Path(source).stem + ".o")
        os.makedirs(os.path.dirname(output), exist_ok=True)
        command = [nvcc.path, "-c", source, "-o", output, "-std=c++17", "-O3", "-Icsrc"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
        command += ["--threads", "2"]
        for arch in CUDA_ARCHS:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        newest = CUDA_ARCHS[-1]
        command += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(
                f"nvcc failed on {source}:\n{done.stdout}{done.stderr}\n"
                "Set ENTROPIC_FAST_CUDA=0 to build without CUDA."
            )
        return output


setup(
    ext_modules=[
        Extension(
            "entropic_fast._C",
            sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=sorted(glob("csrc/**/*", recursive=True)),
            include_dirs=["csrc", pybind11.get_include()],
            extra_compile_args=[*CXX_FLAGS, *OPENMP_FLAGS],
            extra_link_args=[*OPENMP_FLAGS],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
