"""What README.md and docs/ tell people to type exists: configs, modules, settings; and scripts parse."""

import importlib.util
import pathlib
import re
import subprocess

import pytest

from configs import overrides

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(
    r"(?<![\w/.-])(?:configs|tests|tools|docs|notebooks|benchmarks|eval)/[\w./-]+\.(?:py|md|ipynb)\b"
)
MODULE = re.compile(r"python3? -m ((?:tools|eval|benchmarks|pallas_kernels|runtime)(?:\.\w+)*)")
SETTING = re.compile(r"--config\.([a-z_][\w.]*)")
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def page_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_and_modules_exist(page):
    text = page.read_text()
    missing = [name for name in PATH.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in MODULE.findall(text) if importlib.util.find_spec(name) is None]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page_name(page)} names what does not exist: {missing}"


@pytest.fixture(scope="module")
def fields():
    """Of every kind of experiment that pages speak of, and the parts that hold them."""
    kinds = ("quickstart.py", "lra_listops.py", "mqar.py:smoke,mamba2", "hmt_stdlib.py:hmt")
    leaves = {name for kind in kinds for name in overrides.fields(overrides.load(f"{ROOT}/configs/{kind}"))}
    return leaves | {leaf[: dot.start()] for leaf in leaves for dot in re.finditer(r"\.", leaf)}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_settings_exist(page, fields):
    unknown = {name.rstrip(".") for name in SETTING.findall(page.read_text())} - fields
    assert not unknown, f"{page_name(page)}: no config has {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_shell_blocks_parse(page):
    for language, text in BLOCK.findall(page.read_text()):
        if language == "bash":
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert done.returncode == 0, f"{page_name(page)}: {done.stderr}\n{text}"
