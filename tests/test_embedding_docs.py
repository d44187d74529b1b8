"""The Python blocks of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page}-{i}")
    for page in (
        "README.md",
        "docs/guides/embed_sampler.md",
        "docs/guides/embed_loop.md",
        "docs/guides/pool_and_loader.md",
    )
    for i, block in enumerate(BLOCK.findall((ROOT / page).read_text()))
]


def test_every_way_in_has_its_block():
    text = (ROOT / "docs/guides/embed_sampler.md").read_text()
    assert len(BLOCK.findall(text)) == text.count("```") / 2
    for name in (
        "generate",
        "stream",
        "GuidanceCallback",
        "attach",
        "LearnerGuidance",
        "make_cond_fn",
        "criterion=",
    ):
        assert any(name in block for block in BLOCK.findall(text)), name


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_short_and_runs(
    block, tmp_path, monkeypatch, stable_diffusion_folder, stable_diffusion_3_folder
):
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 20
    (tmp_path / "sd15").symlink_to(stable_diffusion_folder)
    (tmp_path / "sd3").symlink_to(stable_diffusion_3_folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<documentation>", "exec"), {})
