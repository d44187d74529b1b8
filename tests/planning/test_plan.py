"""Plans against torch's counter, real counts of the sampler, the published sizes, and their own
arithmetic.
"""

import dataclasses
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpfast.config import ASSETS, Recipe
from dpfast.errors import InputError
from dpfast.generate.from_recipe import new_sampler
from dpfast.hardware.flops import Counts, count_passes, count_work
from dpfast.hardware.peaks import DEVICES, float8_product, peaks_of
from dpfast.learn.models import Committee, build_learner
from dpfast.planning import architectures
from dpfast.planning.architectures import published, without_weights
from dpfast.planning.fitting import fit, place_pool
from dpfast.planning.measure import Timings, measure
from dpfast.planning.methods import stable_diffusion_15
from dpfast.planning.network import BASE, BETWEEN, BUCKET, WITHIN, Link, link_of, step_seconds
from dpfast.planning.plan import GENERATION, STATED, plan
from dpfast.planning.stages import count_stages
from dpfast.planning.table import plan_table
from dpfast.pool.memory_tiers import GIB
from dpfast.pool.placement import Placement
from dpfast.pool.pool import SamplePool
from dpfast.sources.costs import Cost, Prices
from dpfast.sources.guided_methods import GuidedRequest, guided_method
from dpfast.sources.strengths import Strengths


@pytest.fixture(scope="module")
def recipe():
    return Recipe.load("fashion", generator={"batch_size": 8})


@pytest.fixture(scope="module")
def stages(recipe):
    return count_stages(recipe, without_weights("fashion"), half_training=False)


def torch_counts(call):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def test_counts_of_every_architecture_are_those_of_torchs_counter():
    work = stable_diffusion_15(256)
    with torch.device("meta"):
        x, tokens, t = torch.empty(1, 4, 32, 32), torch.empty(1, 77, 768), torch.empty(1)
        configs = {name: each.config for name, each in architectures.ARCHITECTURES.items()}
        unet = diffusers.UNet2DConditionModel(sample_size=32, **configs["stable-diffusion-1.5"])
        vae, tiny = diffusers.AutoencoderKL(**architectures.VAE), diffusers.AutoencoderTiny()
        dit = diffusers.DiTTransformer2DModel(sample_size=32, **configs["dit-xl-2"])
        vit = architectures.vit_b_16()
    with torch.no_grad():
        assert work.denoiser.forward == torch_counts(
            lambda: unet(x, t, encoder_hidden_states=tokens)
        )
        assert work.decoder.forward == torch_counts(lambda: vae.decode(x))
        assert work.tiny.forward == torch_counts(lambda: tiny.decode(x))
        images = torch.empty(1, 3, 224, 224, device="meta")
        assert work.learner.forward == torch_counts(lambda: vit(images))
        label = torch.zeros(1, dtype=torch.int64, device="meta")
        counted = count_work(lambda: dit(x, timestep=t.long(), class_labels=label)).flops
        assert (
            counted
            == torch_counts(lambda: dit(x, timestep=t.long(), class_labels=label))
            == 237333676032
        )


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("stable-diffusion-1.5", 859.520964),
        ("stable-diffusion-2.1", 865.910724),
        ("stable-diffusion-xl", 2567.463684),
    ],
)
def test_a_published_unet_has_its_published_size(name, millions):
    made = published(name, classes=1, dtype=torch.bfloat16)
    assert sum(w.numel() for w in made.denoiser.model.parameters()) == round(millions * 1e6)
    # the autoencoder of XL overflows in 16 bits
    assert (made.decoder.dtype == torch.float32) == (name == "stable-diffusion-xl")
    assert made.denoiser.sample_shape[1] * 8 == architectures.PIXELS[name]


@pytest.mark.parametrize(
    ("name", "parameters", "decoder"),
    [
        ("pixart-sigma", 610_856_096, 83_653_863),
        ("sana-1.6b", 1_604_462_752, 312_250_275),
        ("flux-dev", 11_901_408_320, 83_819_683),
        ("flux-schnell", 11_891_178_560, 83_819_683),
    ],
)
def test_a_published_transformer_has_its_published_size(name, parameters, decoder):
    """With the layers for prompts alone, of which the denoiser keeps what they give."""
    about = architectures.ARCHITECTURES[name]
    with torch.device("meta"):
        whole = about.kind(**about.config)
    assert sum(w.numel() for w in whole.parameters()) == parameters
    made = published(name, classes=1, dtype=torch.bfloat16)
    behind = ("caption_", "context_embedder", "time_text_embed.text_embedder")
    alone = sum(w.numel() for n, w in whole.named_parameters() if n.startswith(behind))
    assert sum(w.numel() for w in made.denoiser.model.parameters()) == parameters - alone
    assert sum(w.numel() for w in made.decoder.model.parameters()) == decoder
    assert made.denoiser.sample_shape[1] * about.scale == architectures.PIXELS[name] == 1024
    assert (made.guidance_decoder is made.decoder) == (name == "sana-1.6b")
    assert len(made.table(4)) == 4


def one(sampler, **options):
    """The counted price of one sample."""
    return Prices(sampler, **options).at(sampler.cfg_scale)


def test_the_weights_are_those_of_the_denoiser_and_of_both_decoders(stages):
    elements = sum(p.numel() for p in without_weights("fashion").denoiser.model.parameters())
    for part in ("vae", "tiny_decoder"):
        file = ASSETS / "fashion" / part / "diffusion_pytorch_model.safetensors"
        elements += sum(value.numel() for value in load_file(file).values())
    assert stages.weights == 4 * elements


def test_a_planned_sample_costs_what_a_real_one_is_counted_to(recipe, stages, fashion):
    options = recipe.learner.options
    learner = build_learner(recipe.learner.model, classes=10, channels=1, **options).eval()
    assert (
        stages.unguided.flops
        == one(new_sampler(recipe, fashion, None, compile=False), guided=False).flops
    )
    assert stages.guided.flops == one(new_sampler(recipe, fashion, learner, compile=False)).flops


@pytest.mark.parametrize(("plain", "guided"), [(1.5, 1.0), (1.0, 2.5), (1.5, 2.5)])
def test_guided_samples_are_planned_at_the_cfg_scale_of_the_first_round(
    plain, guided, recipe, stages, fashion
):
    """An anchor adds no FLOPs; CFG that guided samples switch off or on does."""
    changed = dataclasses.replace(
        recipe,
        generator=dataclasses.replace(recipe.generator, cfg_scale=plain),
        guidance=dataclasses.replace(recipe.guidance, anchor=0.5 if guided != 1 else 0.0),
        practice=dataclasses.replace(recipe.practice, cfg_scale_rounds=(guided,)),
    )
    planned = count_stages(changed, without_weights("fashion"), half_training=False)
    options = recipe.learner.options
    learner = build_learner(recipe.learner.model, classes=10, channels=1, **options).eval()
    paid = Prices(new_sampler(changed, fashion, learner, compile=False)).at(guided)
    assert planned.guided.flops == paid.flops
    assert (planned.guided.flops == stages.guided.flops) == (guided != 1)
    assert (planned.unguided.flops == stages.unguided.flops) == (plain != 1)
    assert planned.guided_bytes == stages.guided_bytes or guided == 1


def test_reused_features_are_planned_and_paid_alike(recipe, stages, fashion):
    cached = dataclasses.replace(
        recipe, generator=dataclasses.replace(recipe.generator, cache_interval=2)
    )
    planned = count_stages(cached, without_weights("fashion"), half_training=False)
    paid = one(new_sampler(cached, fashion, None, compile=False), guided=False)
    assert planned.unguided.flops == paid.flops < 0.7 * stages.unguided.flops
    assert planned.guided == stages.guided  # every second step is guided: nothing to reuse


@pytest.mark.parametrize(
    "changes", [{"early_candidates": 3.0, "early_until": 0.5}, {"restart": 0.5}], ids=str
)
def test_every_way_is_planned_at_what_a_sample_is_paid(recipe, changes, fashion):
    chosen = dataclasses.replace(recipe, practice=dataclasses.replace(recipe.practice, **changes))
    planned = count_stages(chosen, without_weights("fashion"), half_training=False)
    learner = build_learner(
        recipe.learner.model, classes=10, channels=1, **recipe.learner.options
    ).eval()
    sampler = new_sampler(chosen, fashion, learner, compile=False)
    pool, cost = SamplePool(shape=(1, 32, 32)), Cost()
    pool.append(
        new_sampler(chosen, fashion, None, compile=False).generate(torch.arange(10)),
        round=0,
        omega=0.0,
    )
    way = guided_method(chosen, sampler, sampler, lambda: pool)
    list(
        way.make(
            GuidedRequest(
                labels=torch.arange(10),
                start=10,
                done=0,
                strengths=Strengths(omega=0.05),
                cfg_scale=1.5,
                learner_step=0,
            ),
            cost,
        )
    )
    # candidates' ids count from the initial samples on
    extra = 1 + 10 / 1490 if "restart" in changes else 1.0
    assert planned.guided.flops * cost.samples == pytest.approx(
        cost.flops, rel=2 * (extra - 1) + 1e-9
    )


def test_the_stages_of_every_way_are_timed(recipe):
    quick = dataclasses.replace(
        recipe,
        generator=dataclasses.replace(recipe.generator, steps=2, batch_size=10),
        guidance=dataclasses.replace(recipe.guidance, every=1),
        practice=dataclasses.replace(recipe.practice, early_candidates=3.0, early_until=0.5),
    )
    timings = measure(quick, seconds=2.0)
    assert min(timings.unguided, timings.guided, timings.training, timings.evaluation) > 0
    assert timings.guided > timings.unguided


def test_a_committee_adds_its_second_member(recipe, stages, fashion):
    apart = dataclasses.replace(
        recipe, guidance=dataclasses.replace(recipe.guidance, criterion="disagreement")
    )
    planned = count_stages(apart, without_weights("fashion"), half_training=False)
    learner = build_learner(
        recipe.learner.model, classes=10, channels=1, **recipe.learner.options
    ).eval()
    sampler = new_sampler(apart, fashion, Committee(learner, learner).eval(), compile=False)
    assert planned.guided.flops == one(sampler).flops > stages.guided.flops
    assert planned.training == stages.training


def test_bytes_are_operands_and_results_and_leave_scores_out():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count_work(lambda: a @ b) == Counts(full=2 * 3 * 5 * 7, moved=4 * (15 + 35 + 21))
    q = torch.empty(1, 2, 64, 8, device="meta", dtype=torch.bfloat16)
    found = count_work(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert found.full == 0  # fused attentions compute in the dtype that goes in
    assert found.half == 2 * 2 * 2 * 64 * 64 * 8
    assert found.moved == 4 * q.nbytes  # queries, keys, values and the result; no scores


def test_generation_takes_the_share_that_a_gpu_reached_with_its_kind_of_network(recipe):
    for pipeline, share in (
        ("fashion", GENERATION["transformer"]),
        ("stable-diffusion-1.5", GENERATION["unet"]),
    ):
        changed = dataclasses.replace(
            recipe, generator=dataclasses.replace(recipe.generator, pipeline=pipeline)
        )
        phases = {phase.name: phase for phase in plan(changed, "h200").phases}
        assert phases["guided samples"].utilisation == pytest.approx(share)
        assert phases["training"].utilisation == pytest.approx(STATED["training"])


def test_phases_take_their_share_of_the_peak(recipe, stages):
    made = plan(recipe, "a100", count=4, utilisation=0.25)
    phases = {phase.name: phase for phase in made.phases if phase.source == "dp"}
    guided, device = phases["guided samples"], DEVICES["a100"]
    assert guided.units == 3000
    expected = (
        3000 / 4 * max(stages.guided.full / device.full, stages.guided.moved / device.bandwidth)
    )
    assert guided.limit == pytest.approx(expected)
    assert guided.seconds == pytest.approx(4 * expected)
    assert phases["training"].units == 1200 * 64
    static = [phase for phase in made.phases if phase.source == "static"]
    assert static[0].units == 4500 - 1500  # the first ones are shared
    assert made.device_hours == pytest.approx(
        4 * sum(phase.seconds for phase in made.phases) / 3600
    )


def test_a_step_waits_for_the_gradients_of_many_devices(recipe, stages):
    wide = dataclasses.replace(
        recipe, learner=dataclasses.replace(recipe.learner, precision="bf16")
    )
    training = next(
        phase for phase in plan(wide, "h100", count=64).phases if phase.name == "training"
    )
    assert training.limited_by == "network"
    alone = training.units / 64 * training.counts.flops / DEVICES["h100"].half
    reduce = 1200 * link_of(DEVICES["h100"], 64).all_reduce(stages.learner.gradients, 64)
    assert training.limit == pytest.approx(
        max(alone, training.units / 64 * training.counts.moved / 3.35e12) / 3 + reduce
    )


def test_an_all_reduce_takes_its_ring_and_a_latency_for_each_bucket():
    link = Link(latency=1.0, bandwidth=10.0)
    assert link.all_reduce(100.0, 1) == 0.0
    assert link.all_reduce(100.0, 2, bucket=100) == 1.0 + 10.0
    assert link.all_reduce(100.0, 4, bucket=30) == 4.0 + 2 * 3 / 4 * 10.0
    a100 = DEVICES["a100"]
    assert link_of(a100, 8) == Link(latency=BASE + 14 * WITHIN, bandwidth=300e9)
    # four nodes
    assert link_of(a100, 32) == Link(latency=BASE + 14 * WITHIN + 4 * BETWEEN, bandwidth=8 * 25e9)
    assert link_of(DEVICES["b200"], 256).bandwidth == 8 * 50e9
    assert BUCKET == 25 * 2**20
    assert step_seconds(3.0, 1.9) == 3.0  # hidden behind the backward pass
    assert step_seconds(3.0, 5.0) == 1.0 + 5.0


class Named:
    def __init__(self, name):
        self.get_device_name = lambda device: name


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L4", None),
    ],
)
def test_peaks_are_those_of_the_module_that_is_there(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", Named(name).get_device_name)
    found = peaks_of(torch.device("cuda"))
    assert (found and found.name) == known


def test_measured_stages_replace_limits_and_the_table_says_so(recipe):
    timings = Timings(unguided=0.5, guided=1.0, training=1e-3, evaluation=1e-4)
    made = plan(recipe, "a100", timings=timings, samples=2000)
    first = recipe.practice.initial_samples
    # initial, guided, the rest of static, yardstick
    seconds = first * 0.5 + (2000 - first) * (1.0 + 0.5) + 250 * 0.5
    assert made.seconds == pytest.approx(seconds + 2 * (76800e-3 + 48 * 5000e-4 + 10000e-4))
    text = plan_table(made)
    assert "stages timed on this machine" in text
    assert "guided samples" in text


def test_side_by_side_a_plan_names_the_staleness_that_it_needs():
    def line(staleness):
        recipe = Recipe.load("fashion", sources="dp", overlap_staleness=staleness)
        made = plan(recipe, "h100", count=2)
        assert made.job.longest == 160  # six rounds in the 960 steps before the cool-down
        return next(row for row in plan_table(made).splitlines() if "side by side" in row)

    assert line(159).endswith(", with --overlap-staleness 160 or more")
    assert "staleness" not in line(160)


def test_the_published_pools_have_their_sizes():
    assert Placement.of(6_500_000, (3, 256, 256)).bytes_per_sample * 6_500_000 == pytest.approx(
        1.278e12, rel=1e-3
    )
    assert Placement.of(
        6_500_000, (4, 32, 32), "latents"
    ).bytes_per_sample * 6_500_000 == pytest.approx(53.2e9, rel=1e-3)


def test_a_pool_is_placed_by_the_shares_of_a_node(recipe, stages):
    mapped = dataclasses.replace(recipe, pool=dataclasses.replace(recipe.pool, mapped=True))
    wide = dataclasses.replace(stages, image=(3, 256, 256), weights=4 * 10**9)
    eight, many = (
        place_pool(mapped, 6_500_000, wide, DEVICES["h100"], count) for count in (8, 256)
    )
    assert 8 * eight.samples * eight.bytes_per_sample == pytest.approx(1.278e12, rel=1e-3)
    places = {name: held * eight.bytes_per_sample for name, held in eight.in_tier.items()}
    # half of what the weights leave
    assert places["device"] == pytest.approx(0.5 * (80e9 - 4e9), rel=0.01)
    assert places["host"] == pytest.approx(1.278e12 / 8 - places["device"], rel=1e-3)
    assert many.in_tier == {"device": many.samples, "host": 0, "file": 0}
    alone = place_pool(mapped, 6_500_000, wide, DEVICES["a100"], 1)
    assert alone.tiers.budget("file") == int(3.84e12 * 0.9)
    assert alone.fits
    assert alone.in_tier["file"] > 0


def test_the_documented_hours_are_the_planners():
    made = plan(Recipe.load("imagenet1k-dit"), "h100", count=256, samples=6_500_000)
    lines = (Path(__file__).parents[2] / "docs" / "records" / "scaling.md").read_text().splitlines()
    whole, beside = (
        next(line for line in lines if line.startswith(start)).split("|")[3:-1]
        for start in ("| imagenet1k-dit | 256 H100 |", "| imagenet1k-dit | 256 |")
    )
    phases = {phase.name: phase.seconds / 3600 for phase in made.phases}
    making = phases["unguided samples"] + phases["guided samples"] + phases["yardstick"]
    hours = [making, phases["training"], phases["evaluation"], made.seconds / 3600]
    assert [float(cell) for cell in whole[:4]] == pytest.approx(hours, abs=0.006)
    assert [float(cell) for cell in whole[4:]] == pytest.approx(
        [made.device_hours, made.limit / 3600], abs=0.6
    )
    turns, overlap = made.turns, made.overlap
    assert float(beside[0]) == pytest.approx(turns.seconds / 3600, abs=0.006)
    assert float(beside[2]) == pytest.approx(overlap.seconds / 3600, abs=0.006)
    shares = [float(cell.strip(" %")) / 100 for cell in (beside[1], beside[3])]
    assert shares == pytest.approx([made.efficiency(turns), made.efficiency(overlap)], abs=0.006)
    assert int(beside[4]) == overlap.generating


def test_the_documented_fits_are_the_planners():
    recipe = Recipe.load("imagenet1k-dit")
    lines = (Path(__file__).parents[2] / "docs" / "records" / "scaling.md").read_text().splitlines()
    for name, device, count in (
        ("8 H200", "h200", 8),
        ("1 H100", "h100", 1),
        ("1 RTX 4090", "rtx4090", 1),
    ):
        row = next(line for line in lines if line.startswith(f"| imagenet1k-dit | {name} |")).split(
            "|"
        )[3:-1]
        fitted = fit(recipe, device, count=count)
        pool = fitted.pool.in_tier["device"] * fitted.pool.bytes_per_sample
        assert row[0].split() == [str(fitted.generator_micro_batch), "of", "64"]
        assert row[1].split() == [str(fitted.learner_micro_batch), "of", str(4096 // count)]
        assert float(row[2]) == pytest.approx(pool / GIB, abs=0.06)
        peak, most = (bytes / GIB for bytes in (fitted.peak.total, fitted.usable))
        assert row[3].strip() == f"{peak:.1f} of {most:.1f}, {fitted.peak.phase}"
        assert fitted.fits


def test_what_cannot_be_planned_is_refused(recipe):
    few = recipe.practice.initial_samples - 1
    for changes, message in (
        ({"count": 0}, "count = 0"),
        ({"utilisation": 1.5}, "utilisation = 1.5"),
        ({"samples": few}, f"samples = {few}: the run begins with {few + 1}"),
    ):
        with pytest.raises(InputError, match=message):
            plan(recipe, "h100", **changes)
    with pytest.raises(InputError, match=r"device = 'abacus': expected one of a100"):
        plan(recipe, "abacus")
    with pytest.raises(InputError, match=r"no such folder"):
        without_weights("dit-of-nobody")


@pytest.mark.parametrize("name", ["dit-xl-2", "stable-diffusion-1.5"])
def test_fused_blocks_compute_the_products_of_the_plain_ones(name):
    """Sums in a product (beta = 1) and a GELU behind one are products, too."""

    def counts(*, gradient: bool) -> list[float]:
        found = []
        for fused in (False, True):
            denoiser = published(name, dtype=torch.bfloat16, fused=fused).denoiser
            with torch.device("meta"):
                x = torch.empty(1, *denoiser.sample_shape)
                label, t = torch.zeros(1, dtype=torch.int64), torch.empty((), dtype=torch.int64)
            predict = partial(denoiser, timestep=t, labels=label)
            if gradient:
                passes = count_passes(predict, x)
                found.append(passes.both)
            else:
                with torch.no_grad():
                    found.append(count_work(lambda x=x, predict=predict: predict(x)).flops)
        return found

    for gradient in (False, True):
        plain, fused = counts(gradient=gradient)
        # Stable Diffusion's time is a table there
        assert fused == (plain if name == "dit-xl-2" else pytest.approx(plain, rel=1e-4))


def in_float8(recipe, pipeline="dit-xl-2"):
    return dataclasses.replace(
        recipe,
        generator=dataclasses.replace(recipe.generator, pipeline=pipeline, dtype="float8"),
    )


def test_products_in_float8_are_planned_at_their_own_rate(recipe):
    half = dataclasses.replace(
        recipe,
        generator=dataclasses.replace(recipe.generator, pipeline="dit-xl-2", dtype="bfloat16"),
    )
    made, before = (plan(each, "h200", utilisation=1.0) for each in (in_float8(recipe), half))
    counts, whole = (each.stages.unguided for each in (made, before))
    assert counts.flops == whole.flops
    # four linear layers of each of 28 blocks, and 256 tokens: 4 + 8 squares of the width
    blocks = 2 * 256 * 28 * 12 * 1152**2
    assert counts.float8 == 2 * recipe.generator.steps * blocks
    device = DEVICES["h200"]
    expected = counts.half / device.half + counts.full / device.full
    assert device.limits(counts)["compute"] == expected + counts.float8 / 1979e12
    # guided steps differentiate the conditional half in bf16
    assert 0 < made.stages.guided.float8 < counts.float8
    assert made.seconds < before.seconds


@pytest.mark.parametrize("device", ["a100", "rtx4090", "here"])
def test_float8_is_planned_for_devices_that_have_it(device, recipe):
    if device == "here" and torch.cuda.is_available():
        pytest.skip("may have it")
    message = (
        r"needs a GPU of compute capability 9\.0 \(Hopper\) or later, as h100, h200, b200, and"
    )
    with pytest.raises(InputError, match=message):
        plan(in_float8(recipe), device)


def test_float8_is_planned_for_transformers(recipe, stable_diffusion_folder):
    with pytest.raises(InputError, match=r"pipeline = 'stable-diffusion-1\.5': a model with dtype"):
        plan(in_float8(recipe, "stable-diffusion-1.5"), "h100")
    with pytest.raises(InputError, match=r"a StableDiffusionPipeline with dtype = 'float8'"):
        without_weights(stable_diffusion_folder, classes=3, float8=True)
    with pytest.raises(InputError, match="finds no block whose linear layers take it"):
        without_weights("fashion", dtype=torch.float32, float8=True)
    assert without_weights("fashion", dtype=torch.bfloat16, float8=True).denoiser.model is not None


def test_the_measured_product_in_float8_is_that_of_a_frozen_layer():
    work, call = float8_product(torch.device("cpu"), 32)
    out = call()
    assert (work, out.shape, out.dtype) == (2 * 32**3, (32, 32), torch.bfloat16)
