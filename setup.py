"""Builds the compiled module ``entropic_fast._C``; everything else is in pyproject.toml.

The module includes no torch header, so one build serves every torch version and the build needs
only setuptools and pybind11. ``csrc/cpu/simd*/*.cpp`` are compiled once per instruction set, of
which one is chosen at run time. ``csrc/cuda/*.cu`` is compiled when a CUDA compiler is found,
whether or not a GPU is present. A compiler that is found and fails leaves CUDA out, and the build
and ``entropic-fast info`` say why. ``ENTROPIC_FAST_CUDA=0`` leaves CUDA out,
``ENTROPIC_FAST_CUDA=1`` insists.
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
import sysconfig
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LINUX = sys.platform.startswith("linux")

# sm_90 came with CUDA 11.8.
OLDEST_NVCC = (11, 8)
CUDA_ARCHS = ("80", "90")
# From this release on also these. Intermediate code (PTX) is of 90 alone: the driver compiles it
# for every later architecture that has no code of its own.
NEWER_NVCC, NEWER_ARCHS, PTX = (12, 8), ("100", "120"), "90"

# No -ffast-math: sums keep their order. No contraction: every instruction set gives the same bits,
# except in csrc/cpu/simd, whose kernels live on fused multiply-adds.
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
# Folders of csrc/cpu that are compiled once per instruction set, and their flags.
SIMD_FOLDERS: dict[str, list[str]] = {"simd": ["-ffp-contract=fast"], "simd_exact": []}
OPENMP_FLAGS = ["-fopenmp"] if LINUX else []

Macros = list[tuple[str, str | None]]

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
    include_dirs: list[str] = field(default_factory=list)

    @property
    def archs(self) -> tuple[str, ...]:
        return CUDA_ARCHS + (NEWER_ARCHS if self.version >= NEWER_NVCC else ())


def find_nvcc() -> tuple[Nvcc | None, str]:
    """The CUDA compiler and where it was found, or None and what was looked for."""
    candidates: list[tuple[str, str | None]] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        place = os.path.join(home, "bin", "nvcc") if home else None
        candidates.append((f"${variable}/bin/nvcc", place))
    candidates.append(("/usr/local/cuda/bin/nvcc", "/usr/local/cuda/bin/nvcc"))
    candidates.append(("nvcc on PATH", shutil.which("nvcc")))
    candidates += [("pip's own nvcc", path) for path in packaged_nvccs() or [None]]
    looked = []
    for label, path in candidates:
        if path is None:
            looked.append(f"{label} (not set)" if label.startswith("$") else f"{label} (none)")
        elif not os.access(path, os.X_OK):
            looked.append(f"{label} (no such program)")
        else:
            nvcc, problem = inspect_nvcc(path)
            if nvcc is not None:
                return nvcc, f"{path}, release {nvcc.version[0]}.{nvcc.version[1]}"
            looked.append(f"{path} ({problem})")
    return None, "looked for " + ", ".join(looked)


def packaged_nvccs() -> list[str | None]:
    """Compilers of NVIDIA's own wheels (nvidia-cuda-nvcc), newest first."""
    folders = dict.fromkeys([*sysconfig.get_paths().values(), *sys.path])
    found = {
        path
        for folder in folders
        for pattern in ("cu[0-9]*", "cuda_nvcc")
        for path in glob(os.path.join(folder, "nvidia", pattern, "bin", "nvcc"))
    }
    return sorted(found, reverse=True)


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
    # NVIDIA's wheels keep them beside the compiler, or in a package beside the compiler's.
    top = Path(path).absolute().parents[1]
    runtime = top.parent / "cuda_runtime"
    found += [str(folder) for folder in (top / "lib64", top / "lib", runtime / "lib")]
    dirs = [d for d in found if os.path.exists(os.path.join(d, "libcudart_static.a"))]
    if not dirs:
        return None, "names no folder that holds libcudart_static.a"
    include = runtime / "include"
    return Nvcc(path, number, dirs, [str(include)] if include.exists() else []), ""


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
        ext.define_macros = [
            *ext.define_macros,
            ("ENTROPIC_ISAS", f'"{" ".join(isas)}"'),
            *((f"ENTROPIC_HAS_{isa.upper()}", None) for isa in isas),
        ]
        with ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1))) as pool:
            cuda = self.start_cuda(pool, nvcc)
            simd = [
                pool.submit(self.compile_simd, ext, list(ext.define_macros), source, isa, flags)
                for folder in SIMD_FOLDERS
                for source in sorted(glob(f"csrc/cpu/{folder}/*.cpp"))
                for isa, flags in isas.items()
            ]
            nvcc, story, objects = self.finish_cuda(cuda, nvcc, story)
            self.describe_cuda(ext, nvcc, story)
            plain = [pool.submit(self.compile_plain, ext, source) for source in ext.sources]
            objects += [job.result() for job in (*simd, *plain)]

        ext.extra_objects = [*ext.extra_objects, *objects]
        ext.sources = []
        super().build_extension(ext)

    def start_cuda(self, pool: ThreadPoolExecutor, nvcc: Nvcc | None) -> list[Future[str]]:
        if nvcc is None:
            return []
        return [pool.submit(self.compile_cuda, nvcc, s) for s in sorted(glob("csrc/cuda/*.cu"))]

    def finish_cuda(
        self, jobs: list[Future[str]], nvcc: Nvcc | None, story: str
    ) -> tuple[Nvcc | None, str, list[str]]:
        """The compiler, its story and objects; nothing of one that fails, unless insisted on."""
        try:
            return nvcc, story, [job.result() for job in jobs]
        except BuildError as error:
            for job in jobs:
                job.cancel()
            if os.environ.get("ENTROPIC_FAST_CUDA") == "1":
                raise
            told = next((x for x in str(error).splitlines()[1:] if "error" in x.lower()), "")
            story = f"left out: {story} failed: {told.strip()[:200] or 'see the build log'}"
            print(f"entropic_fast: CUDA {story}\n{error}", flush=True)
            return None, story, []

    def describe_cuda(self, ext: Extension, nvcc: Nvcc | None, story: str) -> None:
        """What the module is told of CUDA, and what it is linked with."""
        archs = [f"sm_{arch}" for arch in nvcc.archs] + [f"compute_{PTX}"] if nvcc else []
        macros: Macros = [
            ("ENTROPIC_CUDA_STORY", '"' + story.replace('"', "'").replace("\\", "/") + '"'),
            ("ENTROPIC_CUDA_ARCHS", f'"{" ".join(archs)}"'),
        ]
        if nvcc is not None:
            macros.append(("ENTROPIC_HAS_CUDA", None))
            ext.library_dirs = [*ext.library_dirs, *nvcc.library_dirs]
            # The runtime is linked statically and opens the driver when first called, so the
            # module imports on a machine that has none.
            ext.libraries = [*ext.libraries, "cudart_static", "dl", "rt", "pthread"]
        ext.define_macros = [*ext.define_macros, *macros]

    def compile_plain(self, ext: Extension, source: str) -> str:
        return self.compile_cpp(ext, ext.define_macros, source, self.build_temp, [])

    def compile_simd(
        self, ext: Extension, macros: Macros, source: str, isa: str, flags: list[str]
    ) -> str:
        folder = os.path.join(self.build_temp, isa)
        own = SIMD_FOLDERS[Path(source).parent.name]
        flags = [f"-DENTROPIC_ISA={isa}", *SIMD_FLAGS, *own, *flags]
        return self.compile_cpp(ext, macros, source, folder, flags)

    def compile_cpp(
        self, ext: Extension, macros: Macros, source: str, folder: str, flags: list[str]
    ) -> str:
        [output] = self.compiler.compile(
            [source],
            output_dir=folder,
            macros=macros,
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
        command += [f"-I{folder}" for folder in nvcc.include_dirs]
        for arch in nvcc.archs:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-gencode", f"arch=compute_{PTX},code=compute_{PTX}"]
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
