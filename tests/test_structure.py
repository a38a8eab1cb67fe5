"""The structure of the code: import order, light modules, declared dependencies, banned calls."""

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

# From the lowest floor up. A module imports only from its own room and from lower floors.
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
# Rooms and modules that import without torch.
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
    """Yield the dotted names that a module imports anywhere, including inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Return the rooms of this package that the module at ``path`` imports from."""
    rooms = set()
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "cskd_pipeline" and len(parts) > 1 and parts[1] != "__version__":
            rooms.add(cskd_pipeline.PUBLIC.get(parts[1], name).split(".")[1])
    return rooms


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
def test_the_docstring_of_a_room_lists_all_its_modules(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    named = set(re.findall(r"(?:``|\*\*)(\w+)(?:``|\*\*)", ast.get_docstring(tree) or ""))
    modules = {path.stem for path in room.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in room.glob("*/__init__.py")}
    assert modules - named == set()


def test_the_tour_lists_the_rooms_in_import_order() -> None:
    rooms = re.findall(r"^\d+\. \*\*(\w+)\*\*", cskd_pipeline.__doc__ or "", re.MULTILINE)
    assert [{room} for room in rooms] == [floor for floor in FLOORS if floor != {"__main__"}]


def test_the_stages_never_import_each_other() -> None:
    used = {
        stage: set(imports(ast.parse((PACKAGE / f"pipeline/{stage}.py").read_text("utf-8"))))
        for stage in ("dump", "train")
    }
    assert not any("pipeline.train" in name for name in used["dump"])
    assert not any(name.startswith("cskd_pipeline.pipeline.dump") for name in used["train"])


def test_imports_of_every_form_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "from cskd_pipeline import dump\ndef f():\n    import cskd_pipeline.cache.reader\n"
        "from cskd_pipeline.views.policy import ViewPolicy\nfrom cskd_pipeline import __version__\n"
        "from cskd_pipeline import Targets\n"
    )
    assert rooms_imported(path) == {"dump", "cache", "views", "distill"}


def test_light_modules_import_without_torch() -> None:
    """One process imports all of them and names the first that loads torch."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
    ]
    modules = {
        light: sorted(n for n in names if f"{n}.".startswith(f"cskd_pipeline.{light}."))
        for light in LIGHT
    }
    assert all(modules.values())
    code = (
        "import importlib, sys\n"
        f"for name in {[name for group in modules.values() for name in group]}:\n"
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


def test_every_imported_package_is_declared_and_pinned() -> None:
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
    # torch.utils.tensorboard imports tensorboard, timm imports torchvision, and fsspec imports the
    # package for a URL scheme.
    indirect = {"tensorboard", "torchvision", "s3fs", "gcsfs", "huggingface-hub"}
    indirect.add("onnxscript")  # imported by torch's exporter
    assert {DISTRIBUTIONS.get(name, name) for name in imported} | indirect == declared
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    declared.remove("gcsfs")  # not installed for tests
    assert declared <= {line.partition("==")[0].replace("_", "-") for line in pins}


UNSAFE = re.compile(
    r"\bpickle\b|(?<![\w.])(eval|exec)\(|shell=True|weights_only=False|allow_pickle=True"
    r"|yaml\.load\(|os\.system\(|trust_remote_code"
)


# These send batches and errors between the processes of one run, through private pipes.
PRIVATE_PIPES = {"handover.py", "workers.py"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_can_run_untrusted_code(path: Path) -> None:
    """Unsafe calls appear only in comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    found = {match[0] for match in UNSAFE.finditer(ast.unparse(tree))}
    assert found <= ({"pickle"} if path.name in PRIVATE_PIPES else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only" in {keyword.arg for keyword in node.keywords}


GLOBAL_RANDOM = re.compile(
    r"^(torch\.(manual_seed|seed|set_rng_state)|torch\.cuda\.manual_seed(_all)?|random\.\w+"
    r"|(np|numpy)\.random\.(seed|rand\w*|random|shuffle|permutation|choice|normal|uniform))$"
)


def global_random_calls(tree: ast.AST) -> Iterator[str]:
    """Yield calls that use a global random state without restoring it (``fork_rng``)."""
    if isinstance(tree, ast.With) and any(
        "fork_rng" in ast.unparse(item.context_expr) for item in tree.items
    ):
        return
    if isinstance(tree, ast.Call) and GLOBAL_RANDOM.match(ast.unparse(tree.func)):
        yield ast.unparse(tree.func)
    for child in ast.iter_child_nodes(tree):
        yield from global_random_calls(child)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_training_uses_a_global_random_state(path: Path) -> None:
    """Randomness is a pure function of seeds, except in a student's initialization and dropout."""
    found = set(global_random_calls(ast.parse(path.read_text(encoding="utf-8"))))
    allowed = {"torch.manual_seed", "torch.cuda.manual_seed"}
    assert found <= (allowed if path.parent.name == "pipeline" else set())


def test_global_random_calls_are_detected() -> None:
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


def test_the_readme_commands_run_in_ci() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "```\nmake demo\nmake test\n```" in readme
    for target in ("demo", "test", "lint", "types"):
        assert f"\nstep make {target}\n" in script
        assert f"\n{target}: $(STAMP)\n" in makefile


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Name and text of every tracked file; none is binary."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            yield name, (ROOT / name).read_text(encoding="utf-8")


def test_no_tracked_file_contains_a_path_of_one_machine() -> None:
    for name, text in tracked_texts():
        assert not re.search(r"(?<![\w.])/(home|root|work|opt|Users)/\w", text), name


# Their terms: image, reported, requested, response.
REPLACED = re.compile(r"(?<![a-z])(pict[u]re|t[o]ld|ask[e]d|answ[e]r)s?(?![a-z])", re.IGNORECASE)


def test_no_tracked_file_contains_a_replaced_word() -> None:
    found = [
        f"{name}:{number}: {match[0]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        for match in REPLACED.finditer(line)
    ]
    assert found == []
