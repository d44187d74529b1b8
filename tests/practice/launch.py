"""Recipes of ImageNet at tiny size, started as their users start them: by torchrun, as real
processes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from dpfast import imagenet
from tests import tiny_pipelines

ROOT = Path(__file__).parents[2]
DEADLINE = 300  # seconds, generous: other work may have the machine
FIELDS = {
    "model": "tests.tiny_pipelines:learner",
    "dtype": "float32",
    "image_size": 16,
    "steps": 6,
    "learner.batch_size": 16,
    "iterations": 30,
    "evaluate_unit": "steps",
    "evaluate_every": 2,
    "patience": 1,
    "patience_growth": "fixed",
    "maximum_rounds": 2,
    "checkpoints_kept": 3,
    "checkpoint_minutes": 0,
}
SIZES = {
    "imagenet100-sd15": {
        "initial_samples": 120,
        "round_samples": 100,
        "maximum_samples": 320,
        "generator.batch_size": 25,
    },
    "imagenet1k-dit": {
        "initial_samples": 1000,
        "round_samples": 1000,
        "maximum_samples": 3000,
        "generator.batch_size": 250,
    },
}


def folders(recipe: str, root: Path) -> list[str]:
    """Makes the generator's and the validation's folder of a recipe; the options that name them."""
    torch.manual_seed(0)
    names = imagenet.load()
    ids = (
        names.ids
        if recipe.startswith("imagenet1k")
        else names.ids_of(imagenet.named("imagenet100"))
    )
    if recipe.endswith("dit"):
        index = dict(enumerate(imagenet.named("imagenet1k")))
        tiny_pipelines.dit(
            root / "generator",
            learned_sigma=True,
            index={str(i): name for i, name in index.items()},
        )
    else:
        tiny_pipelines.stable_diffusion(root / "generator")
        tiny_pipelines.tiny_vae().save_pretrained(root / "generator" / "tiny_decoder")
    generator = torch.Generator().manual_seed(1)
    for wordnet_id in ids:
        folder = root / "validation" / wordnet_id
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(0, 256, (16, 16), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return ["--pipeline", str(root / "generator"), "--validation", str(root / "validation")]


class Launched:
    """``dpfast run RECIPE`` on ``ranks`` processes of one thread, and what they say in
    ``OUT.log``.
    """

    def __init__(
        self, recipe: str, out: Path, options: list[str], *, ranks: int = 2, restarts: int = 0
    ):
        self.out, self.log = out, out.with_suffix(".log")
        fields = FIELDS | SIZES[recipe] if recipe in SIZES else {}
        if "--add-at" in options:  # a patience beside it is refused
            fields = {name: each for name, each in fields.items() if "patience" not in name}
        command = [sys.executable, "-m"]
        if ranks > 1:
            command += [
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={ranks}",
                "--monitor-interval=0.05",
            ]
            command += [f"--max-restarts={restarts}", "-m"]
        command += ["dpfast", "run", recipe, "--quiet", "--out", str(out)]
        command += [
            text
            for name, value in fields.items()
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        with self.log.open("w") as file:  # not a pipe: nobody reads while the test waits
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, number: int, source: str = "dp") -> None:
        """Waits for the checkpoint of this number, or the end of the processes."""
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            saved = [
                int(path.stem.split("-")[1])
                for path in self.out.glob(f"checkpoints_{source}/checkpoint-*.json")
            ]
            if max(saved, default=-1) >= number:
                return
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def workers(self) -> dict[int, int]:
        """rank -> process id of those that live."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
                variables = (status.parent / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            rank = [v for v in variables if v.startswith(b"RANK=")]
            if parent == self.process.pid and rank:
                found[int(rank[0][5:])] = int(status.parent.name)
        return found

    def signal(self, rank: int, number: int = signal.SIGKILL) -> bool:
        """Whether the rank was there."""
        process = self.workers().get(rank)
        if process is not None:
            os.kill(process, number)
        return process is not None

    def killed(self) -> bool:
        """Kills all processes; whether they lived."""
        lived, workers = self.process.poll() is None, self.workers()
        self.process.kill()
        self.process.wait()
        for worker in workers.values():
            os.kill(worker, signal.SIGKILL)
        return lived

    def ended(self, code: int = 0) -> str:
        """Waits for the end; what was said."""
        found = self.process.wait(DEADLINE)
        assert found == code, f"exit code {found}: {self.said}"
        return self.said
