"""What sdists and wheels hold, and what works from a wheel, where neither tests nor docs are."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks import systems
from benchmarks.harness import arguments, gate, timing
from benchmarks.harness.processes import command
from dpfast.cli import bench
from dpfast.cli.main import main
from dpfast.errors import InputError
from dpfast.version import __version__
from tests.test_imports import ROOT

MOST = 25e6  # bytes of a wheel or an sdist
# What a build takes, told by setuptools without one.
LISTS = """
import json, os, sys
from distutils.core import run_setup


def flags(own):
    os.environ["DPFAST_CXXFLAGS"] = own
    (extension,) = run_setup("setup.py", [], stop_after="init").ext_modules
    return extension.extra_compile_args + extension.extra_link_args


dist = run_setup("setup.py", ["-q", "egg_info", "--egg-base", sys.argv[1]], stop_after="run")
build = dist.get_command_obj("build_py")
build.build_lib = "LIB"
build.ensure_finalized()
meta = dist.metadata
print(json.dumps({
    "wheel": [name.removeprefix("LIB/") for name in build.get_outputs(include_bytecode=False)],
    "sdist": dist.get_command_obj("egg_info").filelist.files,
    "description": meta.long_description,
    "classifiers": meta.classifiers,
    "urls": meta.project_urls,
    "licence": meta.license_expression,
    "flags": {own: flags(own) for own in ("", "-fsanitize=address -g1")},
}))
"""


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> dict:
    pytest.importorskip("pybind11", reason="builds the extension")
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LISTS, str(tmp_path_factory.mktemp("metadata"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("asks git which files there are")
    told = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in told.stdout.splitlines() if (ROOT / name).is_file()]


def test_an_sdist_has_every_file_of_a_checkout_and_no_other(lists):
    assert set(tracked()) <= set(lists["sdist"])
    others = {name for name in set(lists["sdist"]) - set(tracked()) if ".egg-info" not in name}
    assert not {name for name in others if not name.endswith((".py", ".md"))}  # new, not yet added


def test_a_wheel_has_the_package_and_below_it_the_benchmarks(lists):
    given = set(lists["wheel"])
    assert {name.partition("/")[0] for name in given} == {"dpfast"}
    package = {name for name in tracked() if name.startswith("dpfast/")}
    suites = {name for name in tracked() if re.fullmatch(r"benchmarks/.*\.py", name)}
    assert package | {f"dpfast/shipped/{name}" for name in suites} <= given
    assert "dpfast/py.typed" in given
    others = given - package - {f"dpfast/shipped/{name}" for name in suites}
    assert all(name.startswith("dpfast/shipped/benchmarks/results/") for name in others)


def test_a_wheel_has_the_records_that_a_suite_reads_and_no_other(lists):
    sources = {path: path.read_text() for path in (ROOT / "benchmarks").rglob("*.py")}
    read = set()
    for text in sources.values():
        read |= set(re.findall(r'read_json_lines\(RESULTS / "(\w+)\.jsonl"\)', text))
        if re.search(r"lines_file\(options", text):
            read |= set(re.findall(r'RECORDS = RESULTS / "(\w+)\.jsonl"', text))
    shipped = {Path(name).stem for name in lists["wheel"] if name.endswith(".jsonl")}
    assert shipped == read


def test_the_page_of_an_index_links_to_nothing_that_only_a_checkout_has(lists):
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|href|srcset)=\"([^\"]+)", lists["description"])
    assert targets
    assert all(target.startswith("https://") for pair in targets for target in pair if target)
    assert lists["description"].startswith("# dpfast")


def test_the_metadata_says_what_the_index_takes(lists):
    assert not [name for name in lists["classifiers"] if name.startswith("License ::")]
    assert "Programming Language :: Python :: 3.10" in lists["classifiers"]  # the lowest
    assert all(url.startswith("https://") for url in lists["urls"].values())
    # a licence of the package, and one of the data that it embeds
    assert lists["licence"] == "Apache-2.0 AND MIT"
    data = (ROOT / "dpfast/assets/fashion_test/LICENSE").read_text()
    assert data.startswith("The MIT License")


def test_only_an_extension_of_the_default_flags_is_stripped(lists):
    stripped, own = (lists["flags"][given] for given in ("", "-fsanitize=address -g1"))
    assert ("-s" in stripped) == sys.platform.startswith("linux")
    assert "-s" not in own
    assert own.index("-g0") < own.index("-g1")  # the last one counts
    assert own[-2:] == ["-fsanitize=address", "-g1"]


def printed(tree: ast.AST) -> list[str]:
    """The string literals that are no docstring."""
    nodes = list(ast.walk(tree))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


def test_a_message_that_names_a_file_of_a_checkout_says_that_it_is_there():
    folders = re.compile(r"\b(docs|tests|tools|examples|csrc)/\w|\b(README|CONTRIBUTING)\.md")
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / "dpfast").rglob("*.py"))
        for text in printed(ast.parse(path.read_text(encoding="utf-8")))
        if folders.search(text) and "of the repository" not in " ".join(text.split())
    ]
    for path in sorted((ROOT / "dpfast" / "recipes" / "paper").glob("*.toml")):
        says = re.search(r"^says = .*$", path.read_text(encoding="utf-8"), re.M)
        if says and folders.search(says[0]):
            found.append(says[0])
    assert not found


def test_the_benchmarks_of_a_wheel_come_before_what_lies_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "dpfast"
    monkeypatch.setattr(bench, "PACKAGE", package)
    with pytest.raises(InputError, match="no folder benchmarks beside"):
        bench.place()
    for folder in (tmp_path, package / "shipped"):  # another package's, then ours
        (folder / "benchmarks").mkdir(parents=True)
        (folder / "benchmarks" / "run.py").touch()
        assert bench.place() == folder


def test_a_process_of_a_suite_works_in_the_current_folder_and_imports_nothing_from_it(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise SystemExit('not these')")
    started = command("benchmarks.harness.records")
    ended = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The benchmarks as a wheel has them, in an empty folder of the user's."""
    for module in (benchmarks, arguments, gate):
        monkeypatch.setattr(module, "CHECKOUT", False)
    monkeypatch.chdir(tmp_path)
    gate.failure.cache_clear()
    yield tmp_path
    gate.failure.cache_clear()


def test_without_the_tests_a_case_is_timed_and_that_is_said_once(installed, capsys):
    gate._untested.cache_clear()
    assert [gate.failure("tests/ops/test_a.py"), gate.failure("tests/ops/test_b.py")] == [None] * 2
    assert capsys.readouterr().err.count("the tests are part of a checkout and do not run") == 1


def test_a_wheel_keeps_records_in_the_current_folder(installed):
    parser = arguments.new_parser("x", "x")
    arguments.add_record(parser, "x")
    assert parser.parse_args(["--record"]).record == Path()
    parser = arguments.new_parser("x", "x")
    arguments.add_record_file(parser, benchmarks.RESULTS / "plan.jsonl")
    assert parser.parse_args(["--record"]).record == Path("plan.jsonl")
    assert "default plan.jsonl" in parser.format_help()


def test_a_wheel_reads_the_lines_it_has_until_the_current_folder_has_some(installed):
    shipped = benchmarks.RESULTS / "study.jsonl"
    assert arguments.lines_file(None, shipped, only_read=True) == shipped
    assert arguments.lines_file(None, shipped, only_read=False) == Path("study.jsonl")
    Path("study.jsonl").touch()
    assert arguments.lines_file(None, shipped, only_read=True) == Path("study.jsonl")
    assert arguments.lines_file(Path("x"), shipped, only_read=True) == Path("x")


def test_a_record_of_a_wheel_names_its_version_and_no_commit_of_its_users(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    kept = timing.machine(timing.torch.device("cpu"))
    assert "commit" not in kept
    assert kept["version"] == __version__


def test_a_missing_extra_of_a_suite_is_named_with_what_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("guidance", "guidance_tables"):  # which another test may have imported
        monkeypatch.delitem(sys.modules, f"benchmarks.systems.{name}", raising=False)
        monkeypatch.delattr(systems, name, raising=False)
    monkeypatch.setattr("dpfast.extras.installed", lambda package: False)
    assert main(["bench", "guidance", "--tables"]) == 2
    assert "pip install 'dpfast[run]'" in capsys.readouterr().err
