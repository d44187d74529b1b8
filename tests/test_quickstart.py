"""The quickstart's commands print what stands below them; its Python is tested with that of other
pages.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

from dpfast.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "quickstart.md"
PART = re.compile(r"((?:^    [^\n]*\n)+)|^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps():
    """[words of a command, lines that it prints] in the order of the page."""
    found = []
    for lines, printed in PART.findall(PAGE.read_text(encoding="utf-8").split("```python")[0]):
        for command in lines.replace("\\\n", " ").splitlines():
            words = shlex.split(command)
            if words[:1] == ["dpfast"]:
                found.append([words[1:], []])
        if printed:
            found[-1][1] += [line for line in printed.splitlines() if line and line != "..."]
    return found


def masked(line):
    """A line without what depends on the machine: what was measured, and when."""
    line = re.sub(r"(iteration|step) +\d+|waited \d+|\d+\.\d+|\d+ s\b|-{5,}", "#", line)
    return " ".join(line.split())


def shares(line):
    """The accuracies of a row of the table at a run's end."""
    return [float(each) for each in re.findall(r"(\d+\.\d+)%", line)[:2]]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_page_shows_a_run_its_images_a_change_and_a_report():
    found = list(steps())
    assert [words[0] for words, _ in found] == ["run", "sample", "run", "report"]
    assert sum(len(lines) for _, lines in found) > 10
    assert any("%" in line for line in found[0][1])


@pytest.mark.long
def test_every_command_prints_what_the_page_shows(tmp_path, monkeypatch, capsys, one_thread):
    """In the page's order, and the accuracies at the end within three points of the page's."""
    monkeypatch.chdir(tmp_path)
    for words, shown in steps():
        assert main(words) == 0
        printed = iter(capsys.readouterr().out.splitlines())
        for line in shown:
            found = next((each for each in printed if masked(each) == masked(line)), None)
            assert found is not None, (words[0], line)
            if "|" not in line:
                assert shares(found) == pytest.approx(shares(line), abs=3), found
    assert (tmp_path / "runs" / "first" / "index.html").is_file()
    assert (tmp_path / "runs" / "grid" / "grid.png").is_file()
    assert (tmp_path / "runs" / "report" / "index.html").is_file()
