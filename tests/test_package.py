"""The archives that a user gets: what is in them, and what is left after pip uninstall.

An sdist and, from it alone, a wheel of pure Python are built here; or LSMHA_ARCHIVES names a folder
with others, as scripts/package.sh does after building the native kernels.
"""

import os
import platform
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "lsmha_fast").rglob("*.py"))
PAGE = [f"lsmha_fast/analysis/page/page.{kind}" for kind in ("css", "html", "js")]
CSRC = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "csrc").rglob("*")
    if p.is_file() and p.suffix not in (".pyc", ".so")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    given = os.environ.get("LSMHA_ARCHIVES")
    if given:
        return Path(given)
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    env = {**os.environ, "LSMHA_BUILD": "skip"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def wheel(folder):
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture
def sdist(folder):
    [path] = folder.glob("*.tar.gz")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    meta = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
    files = [n for n in names if not n.startswith(meta)]
    native = [n for n in files if n.endswith(".so")]
    assert sorted(set(files) - set(native)) == sorted(SOURCES + PAGE)
    assert set(native) <= {"lsmha_fast/_C.abi3.so", "lsmha_fast/_C_cuda.abi3.so"}
    tag = f"cp310-abi3-linux_{platform.machine()}" if native else "py3-none-any"
    assert wheel.stem.endswith(tag)
    assert meta + "licenses/LICENSE" in names


def test_the_sdist_holds_what_a_build_needs_and_no_owner(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    top = sdist.name.removesuffix(".tar.gz") + "/"
    names = {m.name.removeprefix(top) for m in members if m.isfile()}
    needed = {*SOURCES, *PAGE, *CSRC, "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert needed <= names
    more = {n for n in names - needed if "egg-info/" not in n}
    assert more == {"MANIFEST.in", "PKG-INFO", "setup.cfg", "CHANGELOG.md", "constraints.txt"}
    assert {(m.uname, m.gname, m.uid, m.gid) for m in members} == {("root", "root", 0, 0)}


def test_no_path_of_the_build_machine_is_inside(wheel):
    pattern = re.compile(rb"/(?:home|root|tmp|work|opt|mnt|build|Users|usr/local)/[\w.-]+/[\w./-]*")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert pattern.findall(archive.read(name)) == [], name


def test_uninstalling_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    venv.create(tmp_path, symlinks=True)
    before = listing(tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "bin/python")]
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *quiet, "--no-deps", "--no-index", str(wheel)], check=True)
    # neither needs torch
    for option in ("--version", "info"):
        done = subprocess.run([tmp_path / "bin/lsmha", option], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "torch: missing (pip install torch)" in done.stdout
    subprocess.run([*pip, "uninstall", *quiet, "--yes", "lsmha_fast"], check=True)
    assert listing(tmp_path) == before


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
