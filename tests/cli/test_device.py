"""``--device``: every command that runs something takes the GPU that is there, and leaves it alone
when told to.

There is no GPU here: ``torch.cuda`` says that there is one, and the first that is asked to use a
device says which.
"""

import pytest
import torch

import benchmarks.harness.timing
import benchmarks.run
import benchmarks.systems.ablation
import benchmarks.systems.cheaper_steps
import benchmarks.systems.compile_regions
import benchmarks.systems.learner
from dpfast.cli.main import main
from dpfast.errors import InputError
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.pool.memory_tiers import MemoryTiers
from dpfast.report import inclusion, page
from dpfast.report.samples import write_samples
from dpfast.samples import SampleBatch
from dpfast.theory.simulate import simulate
from tests.practice.conftest import recipe  # noqa: F401 - a fixture
from tests.practice.test_loop import run, with_

GPU, CPU = torch.device("cuda"), torch.device("cpu")
CHOSEN = [
    ([], GPU),
    (["--device", "cuda"], GPU),
    (["--device", "cuda:0"], torch.device("cuda:0")),
    (["--device", "cpu"], CPU),
]


class Asked(Exception):
    """Raised in place of the first use of a device, which it names."""


def ask(*_, device, **__):
    raise Asked(torch.device(device))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(Pipeline, "from_pretrained", ask)


def asked(arguments):
    with pytest.raises(Asked) as raised:
        main(arguments)
    return raised.value.args[0]


@pytest.mark.parametrize(("options", "device"), CHOSEN)
def test_run_and_sample_load_the_pipeline_on_the_device(
    options, device, gpu, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert asked(["run", "fashion", *options]) == device
    assert asked(["sample", "--labels", "0", "--out", "images", *options]) == device


@pytest.fixture
def latents(recipe, tmp_path):  # noqa: F811
    """The folder of a run whose pool holds latents, with the checkpoints of its rounds."""
    short = with_(
        recipe, "practice", sources=("dp",), keep_rounds=True, iterations=40, maximum_samples=45
    )
    run(with_(short, "pool", codec="latents"), tmp_path / "run")
    return tmp_path / "run"


def test_report_and_export_decode_and_predict_on_the_device(
    latents, tmp_path, request, monkeypatch
):
    command = ["export", str(latents), "--format", "imagefolder", "--out", str(tmp_path / "images")]
    assert main(command) == 0  # on the CPU that is here
    assert len(list((tmp_path / "images").rglob("*.png"))) == 45
    request.getfixturevalue("gpu")
    # not pinned
    monkeypatch.setattr(
        MemoryTiers, "allocate", lambda _, __, size: torch.empty(size, dtype=torch.uint8)
    )
    monkeypatch.setattr(page, "births", lambda *_: None)  # histograms take a second
    for options, device in (CHOSEN[0], CHOSEN[-1]):
        command[-1] = str(tmp_path / f"images {device} {len(options)}")
        assert asked([*command, *options]) == device
        # a decoder
        assert asked(["report", str(latents), "--out", str(tmp_path / "page"), *options]) == device
        with monkeypatch.context() as patch:
            patch.setattr(
                page,
                "decoder_of_run",
                lambda *_: lambda latents: torch.zeros(len(latents), 1, 16, 16),
            )
            patch.setattr(inclusion, "recipe_learner", lambda *_, **__: Learner())
            assert (
                asked(["report", str(latents), "--out", str(tmp_path / "page"), *options]) == device
            )


class Learner(torch.nn.Module):
    def to(self, device):
        ask(device=device)


@pytest.mark.parametrize(
    ("suite", "module", "name", "at"),
    [
        ("ops", benchmarks.run, "measure", 1),
        ("sampler", benchmarks.systems.ablation, "Bench", 2),
        ("cheaper", benchmarks.systems.cheaper_steps, "Bench", 2),
        ("regions", benchmarks.systems.compile_regions, "pipeline_of", 1),
        ("learner", benchmarks.systems.learner, "trainings", 0),
    ],
)
def test_bench_measures_on_the_device(suite, module, name, at, gpu, monkeypatch):
    monkeypatch.setattr(module, name, lambda *arguments, **_: ask(device=arguments[at]))
    monkeypatch.setattr(benchmarks.harness.timing, "described", lambda *_: {})
    for options, device in CHOSEN:
        assert (
            asked(["bench", suite, *(["--no-gate"] if suite == "ops" else []), *options]) == device
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "fashion"],
        ["sample", "--labels", "0", "--out", "images"],
        ["report", "run"],
        ["export", "run", "--format", "parquet", "--out", "samples"],
    ],
)
def test_without_a_gpu_one_line_says_so(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main([*arguments, "--device", "cuda"]) == 2
    assert (
        capsys.readouterr().err
        == f"dpfast: error: device = 'cuda': torch {torch.__version__} finds 0 GPUs here\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_gpu_are_brought_to_the_host_once_a_batch(tmp_path):
    class OnDevice(torch.Tensor):
        copies = 0

        def cpu(self):
            OnDevice.copies += 1
            return self.as_subclass(torch.Tensor)

        def __iter__(self):
            pytest.fail("images were read where they are")

    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8).as_subclass(OnDevice)
    ids = torch.arange(2)
    batch = SampleBatch(images=images, labels=ids, sample_ids=ids, entropy=ids.float())
    write_samples([batch], ("cat", "dog"), tmp_path / "out")
    assert OnDevice.copies == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["plan", "fashion", "--devise", "h100"],
            "--devise: no such option of dpfast plan; did you mean --device?",
        ),
        (
            ["export", "r", "--format", "parquet", "--out", "o", "--omega", "1"],
            "--omega: no such option of dpfast export; dpfast export --help lists what is known",
        ),
        (
            ["run", "fashion", "--initial_samples", "5"],
            "--initial_samples: no such option of dpfast run; did you mean --initial-samples?",
        ),
        (
            ["doctor", "--device", "cpu"],
            "--device: no such option of dpfast doctor; dpfast doctor --help lists what is known",
        ),
    ],
)
def test_an_option_is_only_suggested_by_the_command_that_has_it(arguments, line, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"dpfast: error: {line}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", [GPU, torch.device("cuda:3"), "cuda", "cuda:3", "tpu"], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda device: Pipeline.from_pretrained("fashion", device=device),
        lambda device: GuidedSampler.from_pretrained("fashion", device=device),
        lambda device: MemoryTiers.detect(device),
        lambda device: simulate(d=10, n=20, keep=1.0, ridge=0.1, rho=0.5, draws=2, device=device),
    ],
    ids=["pipeline", "sampler", "tiers", "theory"],
)
def test_a_gpu_that_is_not_there_is_refused_by_name_however_it_is_given(call, device):
    with pytest.raises(
        InputError, match=rf"^device = '{device}': (torch .* finds 0 GPUs|expected)"
    ):
        call(device)
