"""The compiled module: what it includes, how it is built with and without CUDA."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

from entropic_fast.ops import _native as native

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu"))


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without setting anything up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "setup_script", module)
    spec.loader.exec_module(module)
    return module


def test_module_says_what_it_was_built_with() -> None:
    config = native.build_config()
    assert "portable" in config["isas"]  # type: ignore[operator]
    assert config["compiler"]
    assert bool(config["cuda"]) == bool(config["cuda_archs"])


def test_no_source_includes_torch_and_only_bindings_include_pybind() -> None:
    assert len(SOURCES) > 5
    includes = {p: re.findall(r'#include [<"](.+?)[>"]', p.read_text()) for p in SOURCES}
    for path, names in includes.items():
        assert not [n for n in names if re.match(r"(torch|ATen|c10)/", n)], path
        if any("pybind11" in n or "Python.h" in n for n in names):
            assert path.name == "bindings.cpp"


def test_only_ops_touch_the_compiled_module() -> None:
    for path in (ROOT / "entropic_fast").rglob("*.py"):
        if path.parent.name != "ops":
            code = path.read_text()
            calls = r"import entropic_fast\._C|import _C\b|import_module\(.*_C|native\.module\("
            assert not re.search(calls, code), path


def test_instruction_sets_and_sanitizers_are_listed(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(setup_script.chosen_isas()) == list(setup_script.ISA_FLAGS)
    assert setup_script.sanitizer_flags() == []
    monkeypatch.setenv("ENTROPIC_FAST_ISAS", "portable")
    assert setup_script.chosen_isas() == {"portable": []}
    monkeypatch.setenv("ENTROPIC_FAST_SANITIZE", "address,undefined")
    assert setup_script.sanitizer_flags()[:2] == ["-fsanitize=address", "-fsanitize=undefined"]
    for isas in ("mmx", "portable,mmx"):
        monkeypatch.setenv("ENTROPIC_FAST_ISAS", isas)
        with pytest.raises(setup_script.BuildError, match=f"ISAS must list some of.*{isas}"):
            setup_script.chosen_isas()
    monkeypatch.setitem(setup_script.ISA_FLAGS, "avx2", [])
    monkeypatch.setenv("ENTROPIC_FAST_ISAS", "avx2")
    with pytest.raises(setup_script.BuildError, match="must list portable"):
        setup_script.chosen_isas()
    monkeypatch.setenv("ENTROPIC_FAST_SANITIZE", "memory")
    with pytest.raises(setup_script.BuildError, match="SANITIZE must list some of address"):
        setup_script.sanitizer_flags()


# ---- finding nvcc --------------------------------------------------------------------------------


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch, setup_script: ModuleType) -> ModuleType:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("ENTROPIC_FAST_CUDA", raising=False)
    monkeypatch.setattr(setup_script.os, "access", lambda *_: False)
    monkeypatch.setattr(setup_script.shutil, "which", lambda _: None)
    monkeypatch.setattr(setup_script, "LINUX", True)
    monkeypatch.setattr(setup_script, "packaged_nvccs", list)
    return setup_script


def test_without_nvcc_cuda_is_left_out(no_cuda: ModuleType) -> None:
    nvcc, story = no_cuda.choose_cuda()
    assert nvcc is None and "looked for $CUDA_HOME/bin/nvcc (not set)" in story


def test_insisting_on_cuda_without_nvcc_says_what_was_looked_for(
    no_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPIC_FAST_CUDA", "1")
    with pytest.raises(no_cuda.BuildError, match=r"/usr/local/cuda/bin/nvcc .*nvcc on PATH"):
        no_cuda.choose_cuda()
    monkeypatch.setenv("ENTROPIC_FAST_CUDA", "yes")
    with pytest.raises(no_cuda.BuildError, match="must be 0, 1 or unset, got 'yes'"):
        no_cuda.choose_cuda()


def test_cuda_can_be_turned_off(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPIC_FAST_CUDA", "0")
    assert setup_script.choose_cuda()[0] is None


def fake_nvcc(folder: Path, release: str, with_runtime: bool = True) -> Path:
    """A compiler whose own folder says nothing of where its libraries are, as a wrapper's does."""
    libraries = folder / "elsewhere"
    libraries.mkdir(parents=True)
    if with_runtime:
        (libraries / "libcudart_static.a").touch()
    script = folder / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda compilation tools, '
        f'release {release}, V{release}.1"; else echo \'#$ LIBRARIES=  "-L{libraries}"\' >&2; fi\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@pytest.mark.skipif(os.name != "posix", reason="fakes a compiler with a shell script")
def test_compiler_is_asked_for_its_libraries(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = fake_nvcc(tmp_path, "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc, story = setup_script.find_nvcc()
    assert nvcc.path == str(script) and nvcc.version == (12, 4)
    assert nvcc.library_dirs == [str(tmp_path / "elsewhere")]
    assert "release 12.4" in story


@pytest.mark.skipif(os.name != "posix", reason="fakes a compiler with a shell script")
def test_unfit_compilers_are_passed_over_with_a_reason(
    setup_script: ModuleType, tmp_path: Path
) -> None:
    old = setup_script.inspect_nvcc(str(fake_nvcc(tmp_path / "old", "11.2")))
    assert old[0] is None and "release 11.2 is older than 11.8" in old[1]
    bare = setup_script.inspect_nvcc(str(fake_nvcc(tmp_path / "bare", "12.4", with_runtime=False)))
    assert bare[0] is None and "libcudart_static.a" in bare[1]
    assert "does not run" in setup_script.inspect_nvcc(str(tmp_path / "none"))[1]


def test_cuda_sources_compile(setup_script: ModuleType, tmp_path: Path) -> None:
    nvcc, story = setup_script.find_nvcc()
    if nvcc is None:
        pytest.skip(f"no CUDA compiler: {story}")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert sources
    for source in sources:
        command = [nvcc.path, "-c", str(source), "-o", str(tmp_path / "out.o"), "-std=c++17"]
        command += ["-I", str(ROOT / "csrc"), "-arch=sm_90", "-Werror", "all-warnings"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


@pytest.mark.skipif(os.name != "posix", reason="fakes a compiler with a shell script")
def test_cuda_path_and_nvidias_wheels_are_looked_at(
    no_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: str(path).startswith(str(tmp_path)))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(no_cuda, "packaged_nvccs", list)
    _, story = no_cuda.find_nvcc()
    assert "$CUDA_PATH/bin/nvcc (not set)" in story and "pip's own nvcc (none)" in story
    script = fake_nvcc(tmp_path / "toolkit", "12.4")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    assert no_cuda.find_nvcc()[0].path == str(script)


@pytest.mark.skipif(os.name != "posix", reason="fakes a compiler with a shell script")
@pytest.mark.parametrize(
    ("compiler", "library"), [("cu13", "cu13/lib"), ("cuda_nvcc", "cuda_runtime/lib")]
)
def test_libraries_and_headers_of_nvidias_wheels_are_found(
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    compiler: str,
    library: str,
) -> None:
    nvidia = tmp_path / "nvidia"
    script = fake_nvcc(nvidia / compiler, "13.0", with_runtime=False)
    (nvidia / library).mkdir(parents=True, exist_ok=True)
    (nvidia / library / "libcudart_static.a").touch()
    headers = nvidia / "cuda_runtime" / "include"
    if compiler == "cuda_nvcc":
        headers.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert setup_script.packaged_nvccs()[-1] == str(script)
    nvcc, problem = setup_script.inspect_nvcc(str(script))
    assert nvcc is not None, problem
    assert nvcc.library_dirs == [str(nvidia / library)]
    assert nvcc.include_dirs == ([str(headers)] if compiler == "cuda_nvcc" else [])


def test_newer_compilers_build_for_newer_gpus(setup_script: ModuleType) -> None:
    archs = {version: setup_script.Nvcc("", version, []).archs for version in ((12, 6), (12, 8))}
    assert archs == {(12, 6): ("80", "90"), (12, 8): ("80", "90", "100", "120")}


class Failing:
    """Stands for a compilation that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self) -> str:
        raise self.error

    def cancel(self) -> None:
        pass


def test_a_compiler_that_fails_leaves_cuda_out_unless_insisted_on(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ENTROPIC_FAST_CUDA", raising=False)
    error = setup_script.BuildError(
        "nvcc failed on csrc/cuda/projected_step.cu:\nhost_config.h(139): error: #error -- "
        'unsupported GNU version!\nmore\nSet "ENTROPIC_FAST_CUDA=0" to build without CUDA.'
    )
    nvcc = setup_script.Nvcc("/opt/nvcc", (12, 4), [])
    build = setup_script.BuildExt(setuptools.Distribution())
    kept, story, objects = build.finish_cuda([Failing(error)], nvcc, "/opt/nvcc, release 12.4")
    assert kept is None and objects == []
    assert story.startswith("left out: /opt/nvcc, release 12.4 failed: host_config.h(139): error")
    assert "unsupported GNU version!" in story and story in capsys.readouterr().out
    extension = setuptools.Extension("x", [])
    build.describe_cuda(extension, kept, story)
    macros = dict(extension.define_macros)
    assert "ENTROPIC_HAS_CUDA" not in macros and macros["ENTROPIC_CUDA_ARCHS"] == '""'
    assert "unsupported GNU version!" in macros["ENTROPIC_CUDA_STORY"]
    assert extension.libraries == []
    monkeypatch.setenv("ENTROPIC_FAST_CUDA", "1")
    with pytest.raises(setup_script.BuildError, match="unsupported GNU version"):
        build.finish_cuda([Failing(error)], nvcc, "")


# ---- a build without CUDA, from nothing ----------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, str]]:
    """(module, folder of objects, compiler output) of a build with ENTROPIC_FAST_CUDA=0."""
    library, objects = (tmp_path_factory.mktemp(name) for name in ("library", "objects"))
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", library, "--build-temp", objects],
        cwd=ROOT,
        env={**os.environ, "ENTROPIC_FAST_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    [module] = library.rglob("_C*.so")
    yield module, objects, run.stdout + run.stderr


def test_build_without_cuda_imports_without_torch(cpu_build: tuple[Path, Path, str]) -> None:
    module, _, output = cpu_build
    assert "CUDA not built: left out: ENTROPIC_FAST_CUDA=0" in output
    code = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('_C', {str(module)!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "c = m.build_config()\n"
        "assert c['cuda'] is False and c['cuda_archs'] == [], c\n"
        "names = set(m.kernels)\n"
        "assert not any('cuda' in name for name in names) and 'sgd_step_cpu_float32' in names\n"
        "assert 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_sources_compile_without_warnings(cpu_build: tuple[Path, Path, str]) -> None:
    assert "csrc/" not in "\n".join(
        line for line in cpu_build[2].splitlines() if "warning:" in line
    )


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_only_the_variants_hold_wide_instructions(cpu_build: tuple[Path, Path, str]) -> None:
    """A processor without AVX runs everything but the variants chosen for those that have it."""
    _, objects, _ = cpu_build
    found = sorted(objects.rglob("*.o"))
    assert len(found) >= 4
    for path in found:
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if "avx512" in path.parts:
            assert "%zmm" in code
        elif "avx2" in path.parts:
            assert "%ymm" in code and "%zmm" not in code
        else:
            assert "%ymm" not in code and "%zmm" not in code, path


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_variants_share_no_function_the_linker_could_merge(
    cpu_build: tuple[Path, Path, str],
) -> None:
    _, objects, _ = cpu_build
    variants = [p for p in objects.rglob("*.o") if {"avx2", "avx512"} & set(p.parts)]
    for path in variants:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"^\S+ [WwVvu] ", symbols, re.MULTILINE), symbols
