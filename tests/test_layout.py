"""The shape of the repository, kept by a test rather than by memory."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lsmha_fast"
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").is_file())
PARTS = [
    "lsmha_fast/ops/{}/__init__.py",
    "lsmha_fast/ops/{}/op.py",
    "lsmha_fast/ops/{}/reference.py",
    "lsmha_fast/ops/{}/_triton.py",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
]
# a layer may import itself and the layers named here
LAYERS = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"nn", "ops"},
    "data": {"ops"},
    "analysis": {"models", "nn", "ops", "data"},
    "train": {"models", "data"},
    "deploy": {"models", "nn", "ops"},
}
# modules beside the layers that every layer may use
COMMON = {"_ext", "_files", "_lazy", "_version"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    """Dotted names inside the package that a file imports, at any depth."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                name = ".".join((*base, *filter(None, [node.module])))
            else:
                name = node.module
            names = [f"{name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] == "lsmha_fast")


def test_the_four_ops_exist():
    assert {"attention", "conv_stem", "head_class_sums", "seq_pool"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("part", PARTS)
def test_every_op_is_complete(op, part):
    assert (ROOT / part.format(op)).is_file()


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    allowed = LAYERS[layer] | COMMON | {layer}
    for path in (PACKAGE / layer).rglob("*.py"):
        for name in imports_of(path):
            target = name.split(".")[1] if "." in name else ""
            assert target in allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("op", OPS)
def test_ops_are_independent_and_backends_do_not_mix(op):
    folder = PACKAGE / "ops" / op
    for path in folder.glob("*.py"):
        for name in imports_of(path):
            parts = name.split(".")
            inside = parts[2] if len(parts) > 2 else ""
            assert inside not in set(OPS) - {op}, f"{path.name} of {op} imports {name}"
            if inside != op or path.stem in ("op", "__init__"):
                continue
            module = parts[3] if len(parts) > 3 else ""
            assert module != "reference" or path.stem == "reference", f"{path.name}: {name}"
            assert module != "op", f"{path.name} of {op} imports {name}"
            if module.startswith("_"):  # a backend imports only its own parts
                backend = path.stem.split("_")[1]
                assert module.split("_")[1] == backend, f"{path.name} of {op} imports {name}"


def test_importing_ops_loads_no_kernels():
    code = (
        "import sys, lsmha_fast.ops, lsmha_fast.nn, lsmha_fast.models\n"
        "bad = [m for m in sys.modules if m.split('.')[-1].startswith(('_triton', '_cpp', '_C'))"
        " and m.startswith('lsmha_fast') and m != 'lsmha_fast.ops._triton_utils']\n"
        "assert not bad and 'triton' not in sys.modules, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_works_without_triton_and_without_the_extension():
    code = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('triton', 'lsmha_fast._C'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch\n"
        "from lsmha_fast import create_model, ops\n"
        "model = create_model('cct_2_3x2_32', 10, num_heads=16)\n"
        "model(torch.randn(2, 3, 32, 32)).sum().backward()\n"
        "x, w, y = torch.randn(4, 5, 2, 3), torch.randn(2, 3), torch.zeros(4).long()\n"
        "ops.head_class_sums(x, w, y, 2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_says_its_job(path):
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "no module docstring"


def test_every_public_name_exists():
    import lsmha_fast

    for name in lsmha_fast.__all__:
        assert getattr(lsmha_fast, name) is not None


def readme_table():
    """Rows of the README's table of ops and backends: op -> set of backends marked as there."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| op |"))
    header = [c.strip() for c in lines[start].strip("|").split("|")]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [c.strip() for c in line.strip("|").split("|")]
        marked = {h for h, c in zip(header[1:], cells[1:], strict=True) if c == "yes"}
        rows[cells[0].strip("`")] = marked
    return rows


def test_readme_table_is_true():
    table = readme_table()
    assert set(table) == set(OPS)
    for op, marked in table.items():
        module = __import__(f"lsmha_fast.ops.{op}.op", fromlist=["CHECKS"])
        assert marked == set(module.CHECKS), op


def test_the_repository_speaks_of_itself_alone():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(home|root|work)/[a-z]")
    for name in files:
        if Path(name).suffix in {".py", ".md", ".sh", ".toml", ".cpp", ".h", ".cu", ".json"}:
            assert not pattern.search((ROOT / name).read_text()), name
