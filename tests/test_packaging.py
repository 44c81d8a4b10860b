"""What gets installed: a wheel that works with no source tree, and an import that costs nothing."""

from __future__ import annotations

import email.message
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"gems_compile": "gems_compile", "lowering": "gems_compile/lowering"}
FOLDERS["kernels"] = "gems_compile/kernels"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What the command prints; its complaint, if it fails, is the test's."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def copy_tree(to: Path) -> Path:
    """The sources without what an earlier build left beside them, which setuptools would reuse."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, to / file)
    return to


def make_environment(folder: Path) -> Path:
    """The Python of a new environment that has this one's packages, but none of its .pth files.

    So torch is there, and the editable install of this project is not.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = (folder / "lib").glob("python*/site-packages")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    return folder / "bin/python"


def install(python: Path, *what: str | Path) -> None:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", *options, *what, cwd=python.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = copy_tree(folder / "tree")
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
    run(*command, tree, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel."""
    python = make_environment(tmp_path_factory.mktemp("installed") / "venv")
    install(python, wheel)
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """Variables that send everything a process writes by itself into ``tmp_path``."""
    names = ("HOME", "XDG_CACHE_HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    return dict.fromkeys(names, str(tmp_path)) | {"PYTHONDONTWRITEBYTECODE": "1"}


# --------------------------------------------------------------------------- the wheel


def test_the_wheel_holds_every_source_and_no_other_top_level_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "gems_compile",
        "gems_compile-0.1.0.dist-info",
    }
    sources = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert {"gems_compile/py.typed", "gems_compile/lowering/native.c"} <= names
    assert "gems_compile/defaults/nvidia-sm90.json" in names
    assert {f"gems_compile/page/page.{kind}" for kind in ("html", "css")} <= names
    assert "gems_compile/page/main.js" in names
    assert wheel.name == "gems_compile-0.1.0-py3-none-any.whl"


def test_the_metadata(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = Distribution.at(tmp_path / "gems_compile-0.1.0.dist-info")
    metadata = found.metadata
    assert isinstance(metadata, email.message.Message)
    assert (metadata["Name"], metadata["Version"]) == ("gems-compile", "0.1.0")
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert metadata.get_all("License-File") == ["LICENSE"]
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {"interpreter", "test", "config", "bench", "dev"}
    needed = {line for line in found.requires or () if "extra" not in line}
    assert needed == {"torch>=2.11", "triton>=3.6"}
    points = {(point.group, point.name): point.value for point in found.entry_points}
    assert points == {
        ("torch_dynamo_backends", "gems"): "gems_compile.backend:gems",
        ("console_scripts", "gems"): "gems_compile.__main__:main",
    }
    # below licenses/ since setuptools 77
    licence = found.read_text("licenses/LICENSE") or found.read_text("LICENSE")
    assert licence == (ROOT / "LICENSE").read_text()


COMPILE = """
import sys
import torch

from triton.runtime.interpreter import GridExecutor

launches = 0
launch = GridExecutor.__call__

def counted(self, *args, **kwargs):
    global launches
    launches += 1
    return launch(self, *args, **kwargs)

GridExecutor.__call__ = counted

def chain(x, y):
    return torch.nn.functional.gelu(x * 2 + y).sum(-1)

assert "gems" in torch._dynamo.list_backends()
assert "gems_compile" not in sys.modules
x, y = torch.randn(8, 33), torch.randn(33)
out = torch.compile(chain, backend="gems")(x, y)
torch.testing.assert_close(out, chain(x, y))
assert launches > 0, "every node ran as ATen"
import gems_compile.backend
for name in ("", ".backend", ".lowering", ".kernels"):
    print(sys.modules["gems_compile" + name].__file__)
"""


def test_an_installed_wheel_compiles_without_an_import(
    installed: Path, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    script = tmp_path / "use.py"
    script.write_text(COMPILE)
    variables = elsewhere | {"TRITON_INTERPRET": "1", "GEMS_STRICT": "1"}
    files = run(installed, script, cwd=tmp_path, **variables).splitlines()
    assert len(files) == 4
    assert all(file.startswith(str(installed.parent.parent)) for file in files), files


def test_nothing_called_kernels_or_lowering_is_installed(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec;"
        "print([n for n in ('kernels', 'lowering', 'tests', 'benchmarks') if find_spec(n)])"
    )
    assert run(installed, "-c", code, cwd=tmp_path) == "[]"


def test_an_editable_install_maps_both_folders(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    python = make_environment(tmp_path / "venv")
    install(python, "-e", tree)
    code = (
        "import gems_compile, gems_compile.lowering as l, gems_compile.kernels as k;"
        "from importlib.util import find_spec;"
        "print(gems_compile.__file__, l.__file__, k.__file__, find_spec('lowering'))"
    )
    assert run(python, "-c", code, cwd=tmp_path).split() == [
        *(str(tree / folder / "__init__.py") for folder in FOLDERS),
        "None",
    ]


# --------------------------------------------------------------------------- the import


def test_importing_loads_nothing_heavy_starts_no_device_and_writes_nothing(
    installed: Path, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    code = (
        "import sys, gems_compile;"
        "dir(gems_compile);"
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)));"
        "import torch;"
        "print(torch.cuda.is_initialized())"
    )
    assert run(installed, "-c", code, cwd=tmp_path, **elsewhere).split() == ["[]", "False"]
    assert list(tmp_path.iterdir()) == []


def test_importing_takes_under_a_tenth_of_a_second(installed: Path, tmp_path: Path) -> None:
    code = (
        "import time, torch; start = time.perf_counter();"
        "import gems_compile; print(time.perf_counter() - start)"
    )
    # the least of three: the machine may be busy with other tests
    assert min(float(run(installed, "-c", code, cwd=tmp_path)) for _ in range(3)) < 0.1


def test_every_public_name_is_there(installed: Path, tmp_path: Path) -> None:
    code = (
        "import gems_compile.explain, gems_compile as g;"
        "assert set(g.__all__) <= set(dir(g));"
        "print({name: callable(getattr(g, name)) for name in g.__all__}['explain'], g.__version__)"
    )
    # with the submodule of the same name imported first, which must not hide the function
    assert run(installed, "-c", code, cwd=tmp_path).split() == ["True", "0.1.0"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    import gems_compile

    with pytest.raises(AttributeError, match="module 'gems_compile' has no attribute 'enabel'"):
        _ = gems_compile.enabel


def test_the_version_is_the_one_of_the_project() -> None:
    import gems_compile

    assert f'version = "{gems_compile.__version__}"' in (ROOT / "pyproject.toml").read_text()
