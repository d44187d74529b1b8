"""Samplers of published size beside plain code: their rows at tiny sizes, and the script that runs
them on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import ROOT, run
from benchmarks.harness.arguments import is_wanted
from benchmarks.systems import images, learner, models, naive
from tests.benchmarks.test_benchmarks import recorded
from tests.generate.standin import StandInRecorder, force_reference

CPU = torch.device("cpu")
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
EXPECTED = "expected rows, tests, ops, models, run or experiments"
SD, DIT = "stable-diffusion-1.5", "dit-xl-2"


def record(name: str, guided: list[float], **changes) -> dict:
    seconds = sorted(guided)
    middle = seconds[len(seconds) // 2]
    return {
        "row": name,
        "rounds": len(guided),
        "samples_per_second": {"guided": 1 / middle, "unguided": 1.0},
        "minimum_seconds": {"guided": seconds[0], "unguided": 1.0},
        "cost": 1.2,
        "cost_by_flops": 1.15,
        "share_of_peak": {"guided": 0.3, "unguided": 0.3},
        "first_seconds": {"guided": 2.0, "unguided": 1.0},
        "peak_bytes": None,
    } | changes


@pytest.mark.parametrize("name", models.TINY)
def test_the_rows_run_at_tiny_sizes_and_are_recorded_as_they_come(name, tmp_path, capsys):
    rows = "the predecessor|=(b) batched, eager|(b2)|=dpfast, fused, eager|twice"
    given = ["models", "--tiny", "--device", "cpu", "--models", name, "--rounds", "1"]
    assert run.main([*given, "--rows", rows, "--record", str(tmp_path)]) == 0
    made = [json.loads(line) for line in (tmp_path / "models.jsonl").read_text().splitlines()]
    titles = [each["row"] for each in made]
    assert titles == [
        "(a) the predecessor: batch 1, files",
        "(b) batched, eager",
        "dpfast, fused, eager",
        "(b2) batched, better layout and search",
        "dpfast, fused, CUDA graphs, twice the batch",
    ]
    assert [each["batch"] for each in made] == [1, 2, 2, 2, 4]
    assert [each["rounds"] for each in made] == [models.LEAST_ROUNDS, 1, 1, 1, 1]
    networks = {"vae"} if name == DIT else {"unet", "vae"}
    assert set(made[3]["layouts"]) == networks
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in out] == [
        f"| {name}",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {title}" for title in titles),
    ]


def test_the_rows_say_which_modules_they_run(tmp_path, monkeypatch):
    """On a GPU fused blocks are the default; compiled are diffusers' own, or the learner's."""
    seen = {}
    monkeypatch.setattr(models.Bench, "ours", lambda _, title, **given: seen.update({title: given}))
    for make in models.Bench(models.TINY[DIT], CPU).rows(tmp_path, "dpfast").values():
        make()
    assert {title for title, given in seen.items() if given.get("fused")} == {
        title for title in seen if title.startswith("dpfast, fused, ")
    }
    assert all(title.startswith(("dpfast, fused, ", "dpfast, unfused, ")) for title in seen)
    assert {title for title, given in seen.items() if given["compile"]} == {
        title for title in seen if "compiled" in title
    }
    assert seen["dpfast, fused, float8, CUDA graphs"]["float8"]
    sampler = models.Bench(models.TINY[DIT], CPU).sampler(fused=True, float8=True, compile=False)
    assert all(block.float8 for block in sampler.pipeline.denoiser.model.transformer_blocks)
    others = models.Bench(models.TINY[SD], CPU).rows(tmp_path, "")
    assert not any("float8" in title for title in others)


def test_what_is_compiled_of_a_fused_sampler_is_its_learner():
    """One kind of block, with a tape and without."""
    sampler = models.Bench(models.TINY[DIT], CPU).sampler(
        fused=True, compile=True, compile_region="blocks", cuda_graphs=False
    )
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    sampler.runner.backend = backend
    sampler.generate(torch.arange(2))
    assert len(seen) == 2
    assert sampler.runner._by_blocks.denoiser.model is sampler.pipeline.denoiser.model


def test_published_sizes_are_refused_without_a_gpu(capsys):
    for suite in ("models", "images"):
        assert run.main([suite, "--device", "cpu"]) == 2
        assert f"device = 'cpu': the suite {suite} needs a GPU" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(monkeypatch, capsys):
    monkeypatch.setattr(models.Bench, "predecessor", lambda *_: 1 / 0)
    given = ["models", "--tiny", "--device", "cpu", "--models", DIT, "--rounds", "1"]
    assert run.main([*given, "--rows", "the predecessor|=dpfast, unfused, eager"]) == 1
    captured = capsys.readouterr()
    assert "(a) the predecessor: batch 1, files: ZeroDivisionError" in captured.err
    assert "| dpfast, unfused, eager | " in captured.out


def test_the_predecessor_is_compared_by_minima_until_it_has_seven_rounds():
    few = record(models._A, [1.0, 4.0])
    ours = record("dpfast, eager", [0.10, 0.11, 0.12])
    assert models.over(ours, few) == pytest.approx(10)
    enough = record(models._A, [1.0, 2.0, 2.2, 2.2, 2.2, 2.5, 4.0])
    assert models.over(ours, enough) == pytest.approx(20)
    # records of before say no number of rounds
    del few["rounds"]
    assert models.over(ours, few) == pytest.approx(10)
    cells = models.line(ours, [enough, record("(b) batched, eager", [0.22]), ours]).split(" | ")
    assert cells[4:6] == ["20.0x", "2.00x"]


def test_the_predecessors_timed_call_reads_no_file_back(monkeypatch, tmp_path):
    row = models.Bench(models.TINY[DIT], CPU).predecessor(tmp_path)
    monkeypatch.setattr(naive.Image, "open", lambda path: pytest.fail("read back"))
    for make, kind in ((row.make, "guided"), (row.unguided, "unguided")):
        (path,) = make(torch.tensor([3]), torch.tensor([5]))
        assert path == tmp_path / kind / "0003" / "000000.png"
        assert path.stat().st_size > 0


@pytest.mark.parametrize("faster", ["NCHW", "NHWC"])
def test_b2_has_each_network_in_the_layout_that_takes_less_time(faster, monkeypatch):
    seconds = {"NCHW": 2.0, "NHWC": 2.0, faster: 1.0}
    clock = iter([seconds[layout] for layout in ("NCHW", "NHWC") * 2 for _ in range(2)])
    monkeypatch.setattr(models, "_seconds", lambda call, device: next(clock))
    made = models.Bench(models.TINY[SD], CPU).models()
    assert made.in_faster_layouts(1) == {"unet": faster, "vae": faster}
    for network, layout in ((made.transformer, faster), (made.vae, faster), (made.tiny, "NHWC")):
        weights = [w for w in network.parameters() if w.dim() == 4 and min(w.shape) > 1]
        nhwc = [w.is_contiguous(memory_format=torch.channels_last) for w in weights]
        assert all(nhwc) if layout == "NHWC" else any(not each for each in nhwc)


def test_the_documented_ratios_to_the_predecessor_are_those_of_the_record():
    """DiT's by minima, since one of its two rounds was slow."""
    lines = (ROOT / "docs" / "records" / "results.md").read_text().splitlines()
    for name in (DIT, SD):
        made = [each for each in recorded("models") if each["model"] == name]
        base = made[0]
        assert base["row"] == models._A
        for each in made[1:]:
            if name == DIT:
                ratio = models.over(each, base)
            else:
                ratio = each["samples_per_second"]["guided"] / base["samples_per_second"]["guided"]
            cost = f"{each['cost']:.2f} ({each['cost_by_flops']:.2f})"
            rows = [line.split("|") for line in lines if line.startswith(f"| {each['row']} |")]
            (row,) = [cells for cells in rows if cells[4].strip() == cost]
            assert float(row[5].strip().removesuffix("x")) == pytest.approx(ratio, rel=0.03)


def test_rows_that_search_and_rows_that_do_not_share_no_plan_of_a_convolution():
    """torch keys its plans by TF32, and not by whether it searched."""
    before = torch.backends.cudnn.allow_tf32
    seen = []
    for searched in (False, True):
        with models.convolutions(CPU, searched=searched):
            seen.append(torch.backends.cudnn.allow_tf32)
    assert seen == [True, False]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    "name",
    [
        name if name in models.USUAL else pytest.param(name, marks=pytest.mark.long)
        for name in models.TINY
    ],
)
def test_every_form_makes_the_images_of_plain_code_up_to_bf16(name):
    """They have the same weights, labels and noise."""
    rival, *ours = images.compare(models.TINY[name], CPU, 3, "")
    assert rival["against"] == "(b) in fp32"
    assert [each["row"] for each in ours] == list(images.ROWS)
    for each in ours:
        # measured: latents 0.0008 to 0.016 (of (b) to fp32 0.0096 and 0.013), 49 to 56 dB
        assert each["latents"] < 0.05
        assert each["psnr"] > 40
        # measured 0.977 to 0.990, of (b) 0.977 and 0.980
        assert each["cosine"]["mean"] > rival["cosine"]["mean"] - 0.02
    assert "| dpfast, fused, eager | (b) batched, eager | 3 | " in images.table(name, ours)


def test_images_are_compared_by_their_largest_mean_and_root_mean_square_difference():
    first = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    second = first.clone()
    second[0, 0, 0, 0] = 255
    found = images.beside(first, second)
    assert found == {"largest": 255.0, "mean": 63.75, "psnr": pytest.approx(6.0206, abs=1e-4)}
    assert images.beside(first, first) == {"largest": 0.0, "mean": 0.0, "psnr": None}


def test_the_learners_train_at_tiny_sizes(tmp_path, capsys):
    given = ["learner", "--tiny", "--device", "cpu", "--rounds", "1", "--record", str(tmp_path)]
    assert run.main([*given, "--rows", "=plain loop, fused AdamW|AveragedModel|=dpfast"]) == 0
    made = [json.loads(line) for line in (tmp_path / "learner.jsonl").read_text().splitlines()]
    assert [each["training"] for each in made] == ["fashion", "a tiny ViT"]
    for each in made:
        assert [row["row"] for row in each["rows"]] == [
            "plain loop, fused AdamW",
            "plain loop, fused AdamW, AveragedModel",
            "dpfast",
        ]
    assert run.main(["learner", "--tiny", "--device", "cpu", "--only", "nosuch"]) == 2
    assert "only = 'nosuch': no training has it; there are: fashion" in capsys.readouterr().err


def test_a_learner_trains_alike_under_the_written_average_and_torchs():
    training = learner.trainings(CPU, tiny=True)[1]
    batch = training.batches(CPU)[0]
    losses = []
    for torchs in (False, True):
        step = learner.plain_loop(
            training.model(CPU), training.config, CPU, fused=True, torchs_average=torchs
        )
        losses.append([float(step(*batch)) for _ in range(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("index", [0, 1])
def test_a_captured_loop_takes_the_steps_of_the_plain_one(index, monkeypatch):
    """Forward and backward pass, clipping, optimiser and average, without a host read; what the
    recorder warms up with are steps, too.
    """
    force_reference(monkeypatch)
    training = learner.trainings(CPU, tiny=True)[index]
    config = replace(training.config, warmup=0.0)
    batch = training.batches(CPU)[0]
    plain, captured = (
        learner.plain_loop(training.model(CPU), config, CPU, fused=True, recorder=recorder)
        for recorder in (None, StandInRecorder())
    )
    expected = [float(plain(*batch)) for _ in range(6)]
    assert learner.host_waits(captured, batch, CPU) == 0  # with the capture
    warm_ups = 2
    found = [float(captured(*batch)) for _ in range(3)]
    assert found == pytest.approx(expected[warm_ups + 1 :], rel=1e-6)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ("", True),
        ("eager", True),
        ("x|fused", True),
        ("=dpfast, fused, eager", True),
        ("=fused", False),
        ("graphs", False),
        ("=dpfast, fused", False),
    ],
)
def test_rows_are_chosen_by_a_part_of_their_name_or_the_whole(rows, wanted):
    assert is_wanted("dpfast, fused, eager", rows) == wanted


@pytest.mark.parametrize(
    ("suite", "rows", "text"),
    [
        ("models", "=(b) batched, eager|nosuch", "nosuch"),
        ("models", "=dpfast", "=dpfast"),
        ("learner", "=dpfast|=dpfast, eager", "=dpfast, eager"),
    ],
)
def test_a_row_that_does_not_exist_is_named(suite, rows, text, capsys):
    """Every text is looked at, and not only whether any row is left."""
    assert run.main([suite, "--tiny", "--device", "cpu", "--rows", rows]) == 2
    assert f"rows = {text!r}: no row has it; there are: " in capsys.readouterr().err


def script(*arguments: str, python: str = "python3") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def steps(*arguments: str) -> dict[str, int]:
    """The steps and their limits in seconds."""
    listed = script("--list", *arguments)
    assert (listed.returncode, listed.stderr) == (0, "")
    found = (line.split(": ") for line in listed.stdout.splitlines())
    return {name: int(limit.removesuffix(" s")) for name, limit, *_ in found}


def test_the_script_stays_under_nine_minutes_and_its_rows_beside_the_facts_in_fifteen():
    everything = steps()
    assert list(everything) == [
        *("build", "ops_tests", "gpu_tests", "ops", "models", "dit_blocks", "learner", "run")
    ]
    assert sum(everything.values()) < 9 * 60
    rows = steps("--only", "rows")
    assert list(rows) == ["R1", "R2", "R3", "R4_vit", "R4_compiled", "R4_fashion"]
    assert sum(rows.values()) < 6 * 60
    assert steps("--only", "experiments") == {"experiments": 120}


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("tests", ["build", "ops_tests", "gpu_tests"]),
        ("ops", ["build", "ops"]),
        ("models", ["models", "dit_blocks", "unet_blocks", "learner"]),
        ("run", ["run"]),
        ("experiments", ["experiments"]),
    ],
)
def test_the_script_runs_a_part_of_itself(only, names):
    assert list(steps("--only", only)) == names


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "nosuch"], f"only = 'nosuch': {EXPECTED}"),
        (["--only"], f"only = '': {EXPECTED}"),
        (["--nosuch"], "--nosuch: no such option; usage: benchmarks/on_gpu.sh"),
        (["a", "b"], "folder = 'b': expected one, and 'a' was given"),
    ],
)
def test_the_script_names_what_it_does_not_understand(arguments, named):
    refused = script(*arguments)
    assert refused.returncode == 2
    assert named in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_step_that_fails_lets_the_others_run(tmp_path):
    """Played by a Python that says what it was asked for, and fails for R2."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "asked: $*"\n[[ "$*" != *dit-xl-2* ]]\n')
    python.chmod(0o755)
    out = tmp_path / "a folder"
    played = script("--only", "rows", "--tiny", str(out), python=str(python))
    assert played.returncode == 1
    assert "== R2 failed with 1" in played.stdout
    asked = [line for line in played.stdout.splitlines() if line.startswith("asked: -m bench")]
    assert [line.split()[3] for line in asked] == ["models", "models", "images", *["learner"] * 3]
    assert all(f"--record {out}" in line and "--tiny" in line for line in asked)
    assert (out / "gpu_R3.log").read_text() == f"{asked[2]}\n"


def test_a_step_at_its_limit_is_interrupted_and_one_that_stays_is_killed(tmp_path):
    """Interrupted, pytest tells what has failed until then; terminated, it would tell nothing."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        'trap "echo interrupted" INT\n'
        '[[ "$*" != *benchmarks.run* ]] || for _ in 1 2 3 4 5 6 7 8; do sleep 1; done\n'
    )
    python.chmod(0o755)
    text = (
        SCRIPT.read_text().replace("limit=$((4 * limit))", "limit=1").replace("after=10", "after=2")
    )
    copy = tmp_path / "benchmarks" / "on_gpu.sh"
    copy.parent.mkdir()
    copy.write_text(text)
    played = subprocess.run(
        ["bash", copy, "--only", "experiments", "--tiny", str(tmp_path)],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert played.returncode == 1
    assert "interrupted\n" in played.stdout
    assert "== experiments failed with 137" in played.stdout


def test_every_row_that_the_script_asks_for_exists():
    device = torch.device("cuda")
    makers = {
        name: models.Bench(models.SETTINGS[name], device).rows(ROOT, "") for name in (SD, DIT)
    }
    listed = [script("--list", "--only", only).stdout.splitlines() for only in ("rows", "models")]
    for line in (line for lines in listed for line in lines if ".run models" in line):
        names = [name for name in (SD, DIT) if name in line] or [SD, DIT]
        for text in line.split("--rows ")[1].split("|"):
            for name in names:
                assert any(is_wanted(title, text) for title in makers[name]), text
