"""The shape of the code: which room may import which, what stays light, what is written down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import cskd_pipeline

PACKAGE = Path(cskd_pipeline.__file__).parent
ROOT = PACKAGE.parent

# Lower floors first. A module imports from floors below its own, and from its own room.
FLOORS: list[set[str]] = [
    {"errors"},
    {"runtime"},
    {"views"},
    {"config"},
    {"models"},
    {"distill"},
    {"cache"},
    {"data"},
    {"pipeline"},
    {"tools"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# Rooms, and modules of others, that import without torch.
LIGHT = ["errors", "views", "config", "cache", "distill.encodings", "cli", "runtime.atomic",
         "runtime.classes", "runtime.console", "runtime.progress", "runtime.resources",
         "runtime.schemas", "runtime.signals", "tools.report.plot_files",
         "tools.report.plots"]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """The rooms of this package that the module at ``path`` imports from."""
    found = set()
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "cskd_pipeline" and len(parts) > 1 and parts[1] != "__version__":
            found.add(cskd_pipeline.PUBLIC.get(parts[1], name).split(".")[1])
    return found


def test_every_module_has_a_floor_and_every_floor_a_module() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert rooms_imported(path) == set()  # importing the package costs nothing
        return
    for other in rooms_imported(path) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{name_of(path)} imports {other}"


ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_every_module_stands_in_the_docstring_of_its_room(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    named = set(re.findall(r"(?:``|\*\*)(\w+)(?:``|\*\*)", ast.get_docstring(tree) or ""))
    modules = {path.stem for path in room.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in room.glob("*/__init__.py")}
    assert modules - named == set()


def test_the_tour_has_the_rooms_in_the_order_of_their_imports() -> None:
    rooms = re.findall(r"^\d+\. \*\*(\w+)\*\*", cskd_pipeline.__doc__ or "", re.MULTILINE)
    assert [{room} for room in rooms] == [floor for floor in FLOORS if floor != {"__main__"}]


def test_the_stages_never_import_each_other() -> None:
    used = {
        stage: set(imports(ast.parse((PACKAGE / f"pipeline/{stage}.py").read_text("utf-8"))))
        for stage in ("dump", "train")
    }
    assert not any("pipeline.train" in name for name in used["dump"])
    assert not any(name.startswith("cskd_pipeline.pipeline.dump") for name in used["train"])


def test_an_import_that_points_up_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "from cskd_pipeline import dump\ndef f():\n    import cskd_pipeline.cache.reader\n"
        "from cskd_pipeline.views.policy import ViewPolicy\nfrom cskd_pipeline import __version__\n"
        "from cskd_pipeline import Targets\n"
    )
    assert rooms_imported(path) == {"dump", "cache", "views", "distill"}


def test_light_modules_import_without_torch() -> None:
    """All in one process: one that brought torch in would be named."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
    ]
    of = {
        light: sorted(n for n in names if f"{n}.".startswith(f"cskd_pipeline.{light}."))
        for light in LIGHT
    }
    assert all(of.values())
    code = (
        "import importlib, sys\n"
        f"for name in {[name for modules in of.values() for name in modules]}:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'timm'} & set(sys.modules), f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


DISTRIBUTIONS = {
    "PIL": "pillow",
    "google_crc32c": "google-crc32c",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
}


def test_every_package_that_is_imported_is_declared_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [(n, lines) for n, lines in project["optional-dependencies"].items() if n != "dev"]
    declared = {
        re.split(r"[<>=!~ ]", line)[0].replace("_", "-")
        for line in [*project["dependencies"], *(line for _, extra in extras for line in extra)]
    }
    imported = {
        name.partition(".")[0]
        for path in MODULES
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
    } - set(sys.stdlib_module_names)
    imported.remove("cskd_pipeline")
    # torch.utils.tensorboard imports tensorboard, timm the torchvision of its torch; fsspec imports
    # what reads a kind of URL.
    indirect = {"tensorboard", "torchvision", "s3fs", "gcsfs", "huggingface-hub"}
    indirect.add("onnxscript")  # torch's exporter imports it
    assert {DISTRIBUTIONS.get(name, name) for name in imported} | indirect == declared
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    declared.remove("gcsfs")  # not installed where tests run
    assert declared <= {line.partition("==")[0].replace("_", "-") for line in pins}


UNSAFE = re.compile(
    r"\bpickle\b|(?<![\w.])(eval|exec)\(|shell=True|weights_only=False|allow_pickle=True"
    r"|yaml\.load\(|os\.system\(|trust_remote_code"
)


# Batches and errors on their way between processes of one run, through pipes that nobody else has.
OWN_MESSAGES = {"handover.py", "workers.py"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_runs_other_peoples_code(path: Path) -> None:
    """Words that could open a door stand nowhere but in comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    found = {match[0] for match in UNSAFE.finditer(ast.unparse(tree))}
    assert found <= ({"pickle"} if path.name in OWN_MESSAGES else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only" in {keyword.arg for keyword in node.keywords}


GLOBAL_RANDOM = re.compile(
    r"^(torch\.(manual_seed|seed|set_rng_state)|torch\.cuda\.manual_seed(_all)?|random\.\w+"
    r"|(np|numpy)\.random\.(seed|rand\w*|random|shuffle|permutation|choice|normal|uniform))$"
)


def global_random_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that read or seed a global random state and do not put it back (``fork_rng``)."""
    if isinstance(tree, ast.With) and any(
        "fork_rng" in ast.unparse(item.context_expr) for item in tree.items
    ):
        return
    if isinstance(tree, ast.Call) and GLOBAL_RANDOM.match(ast.unparse(tree.func)):
        yield ast.unparse(tree.func)
    for child in ast.iter_child_nodes(tree):
        yield from global_random_calls(child)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_training_touches_a_global_random_state(path: Path) -> None:
    """Randomness is a pure function of seeds; a student's start and dropout are torch's own."""
    found = set(global_random_calls(ast.parse(path.read_text(encoding="utf-8"))))
    allowed = {"torch.manual_seed", "torch.cuda.manual_seed"}
    assert found <= (allowed if path.parent.name == "pipeline" else set())


def test_a_global_random_call_would_be_seen() -> None:
    tree = ast.parse(
        "torch.manual_seed(1)\nx = np.random.rand(3)\nrandom.random()\n"
        "with torch.random.fork_rng():\n    torch.manual_seed(2)\n"
        "g = torch.Generator().manual_seed(3)\nnp.random.Philox(key=3)\n"
    )
    assert list(global_random_calls(tree)) == [
        "torch.manual_seed",
        "np.random.rand",
        "random.random",
    ]


def test_the_readme_and_ci_have_the_same_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "```\nmake demo\nmake test\n```" in readme
    for target in ("demo", "test", "lint", "types"):
        assert f"\nstep make {target}\n" in script
        assert f"\n{target}: $(STAMP)\n" in makefile


def test_no_paths_of_one_machine_stand_in_the_tree() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".md", ".txt", ".json", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.])/(home|root|work|opt|Users)/\w", text), name
