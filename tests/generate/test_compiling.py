"""compile="auto": a decision by numbers, which a machine learns and keeps."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dpfast.generate import compiling
from dpfast.generate.compiling import CompileCost, CompileCosts, Tuner
from dpfast.generate.sampler import GuidedSampler
from tests.other_user import run_as_other_user

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compile.json"


def test_it_compiles_when_the_savings_exceed_the_cost():
    costs = CompileCosts(CPU, "model")
    costs.record(CompileCost(seconds=60, speedup=1.5))
    assert not costs.decide(1000, 0.1).compile  # saves 33 s
    assert costs.decide(2000, 0.1).compile  # saves 67 s
    assert "2000 samples at 100.0 ms; compiling takes 60 s" in costs.decide(2000, 0.1).reason
    assert not costs.decide(0, 0.1).compile


def test_costs_are_kept_for_the_machine_and_lent_to_other_models(cache):
    assert CompileCosts(CPU, "a").known() == (compiling.ASSUMED["cpu"], "assumed")
    CompileCosts(CPU, "a").record(CompileCost(10, 2.0))
    assert CompileCosts(CPU, "a").known() == (CompileCost(10, 2.0), "measured")
    assert CompileCosts(CPU, "b").known() == (CompileCost(10, 2.0), "measured on other models")
    assert list(json.loads(cache.read_text())) == [compiling.machine(CPU)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"%s": {"a": {"minutes": 1}}}',
        '{"%s": {"a": {"seconds": "x", "speedup": 1}}}',
        '{"%s": 3}',
    ],
)
def test_a_broken_cache_is_as_good_as_none(content, cache):
    cache.parent.mkdir()
    cache.write_text(content.replace("%s", compiling.machine(CPU)))
    assert CompileCosts(CPU, "a").known()[1] == "assumed"


def test_a_tuner_measures_compiling_and_gives_up_where_it_is_slower(cache):
    costs = CompileCosts(CPU, "model")
    costs.record(CompileCost(1, 2.0))
    tuner = Tuner(costs, "auto")
    assert not tuner.decide(100, compiled=False)  # nothing measured yet
    tuner.report(8, 1.6, compiled=False)
    assert tuner.decide(100, compiled=False)  # 100 samples of 0.2 s: saves 10 s
    tuner.report(8, 30.0, compiled=True)
    tuner.report(8, 2.0, compiled=True)
    assert costs.known() == (CompileCost(28.0, 0.8), "measured")
    assert not tuner.decide(10**6, compiled=True)


def test_a_few_samples_stay_eager_and_the_reason_is_told(pipeline, caplog):
    sampler = GuidedSampler(pipeline, steps=2)
    with caplog.at_level("INFO"):
        list(sampler.stream([0, 1, 2, 0], batch_size=2))
    assert not sampler.runner.compiled
    assert not sampler.runner.tuner.decision.compile
    assert "2 samples at" in sampler.runner.tuner.decision.reason
    assert "compile: no" in caplog.text


def test_many_samples_are_compiled_on_the_way(pipeline, learner):
    sampler = GuidedSampler(pipeline, learner, steps=2)
    sampler.runner.tuner.costs.record(CompileCost(0.0, 2.0))
    sampler.runner.backend = "eager"
    batches, compiled = [], []
    for batch in sampler.stream([0, 1, 2, 0, 1, 2, 0], batch_size=2):
        batches.append(batch)
        compiled.append(sampler.runner.compiled)
    # The first batch measures the eager price; whether the later ones stay compiled is for the
    # clock to say.
    assert compiled[:2] == [False, True]
    assert torch.cat([b.sample_ids for b in batches]).tolist() == list(range(7))
    assert sampler.runner.tuner.costs.known()[1] == "measured"


@pytest.fixture
def forgetful():
    compiling._temporary.cache_clear()
    yield
    compiling._temporary.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_without_a_home_the_cache_is_temporary_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DPFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with caplog.at_level("INFO"):
        CompileCosts(CPU, "a").record(CompileCost(10, 2.0))
        assert CompileCosts(CPU, "a").known() == (CompileCost(10, 2.0), "measured")
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"dpfast-{os.getuid()}"
    assert [r.getMessage() for r in caplog.records] == [
        f"measured costs of compiling are kept in {folder}: this user has no home folder"
    ]


@pytest.mark.usefixtures("forgetful")
def test_a_cache_that_cannot_be_written_is_temporary_and_without_a_folder_in_memory(
    tmp_path, monkeypatch, caplog
):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("DPFAST_CACHE", str(file / "cache"))

    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with caplog.at_level("INFO"):
        costs = CompileCosts(CPU, "a")
        costs.record(CompileCost(10, 2.0))
    assert costs.known() == (CompileCost(10, 2.0), "measured")
    assert f"kept in memory alone: {file}/cache cannot be written" in caplog.text


def test_a_user_without_home_and_passwd_entry_can_make_a_sampler():
    said = run_as_other_user(
        "from dpfast import GuidedSampler\n"
        "print(GuidedSampler.from_pretrained('fashion', compile=False, steps=2).runner.tuner)"
    )
    assert said.returncode == 0, said.stderr


def test_inductor_keeps_its_code_beside_the_costs(cache, monkeypatch):
    # where torch says, once some of its modules are imported, that it keeps it itself
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    compiling.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.parent / "inductor")
    assert (cache.parent / "inductor").is_dir()


def test_inductor_stays_where_its_user_put_it_or_where_nothing_lasts(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    compiling.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DPFAST_CACHE", str(tmp_path / "file" / "cache"))
    compiling.keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
