"""The README: its Python runs, its pictures exist, its commands are commands."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from visattn.__main__ import COMMANDS
from visattn.blocks.catalog import BLOCKS
from visattn.core import NORMALIZERS, RELATIONS, SIMILARITIES
from visattn.methods.explain import METHODS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_runs(code, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "assets" / "photos", tmp_path / "assets" / "photos")
    monkeypatch.chdir(tmp_path)
    made = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), made)
    shapes = re.findall(r"^(\w+) = .*# (\([\d, ]+\))", code, re.MULTILINE)
    assert {name: str(tuple(made[name].shape)) for name, _ in shapes} == dict(shapes)
    files = re.findall(r"""["'](cat\.png|out/[\w.]*)["']""", code)
    assert all(Path(name).exists() for name in files)
    assert all(x.isfinite().all() for x in made.values() if isinstance(x, torch.Tensor))


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_commands_and_files_exist():
    assert set(re.findall(r"visattn ([a-z]+) ", TEXT)) <= {*COMMANDS, "bench"}
    assert all((ROOT / name).exists() for name in re.findall(r"configs/\w+\.yaml", TEXT))


@pytest.mark.parametrize("table", [SIMILARITIES, NORMALIZERS, RELATIONS, BLOCKS, METHODS], ids=len)
def test_every_name_of_a_table_is_mentioned(table):
    words = set(re.findall(r"[\w+]+", TEXT))
    assert set(table) <= words
