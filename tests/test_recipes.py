"""Every recipe that is shipped is read by the main that it is for; every one that is named exists."""

import re

import pytest

from tests.harness import ROOT
from util.cli import finetune, pretrain

RECIPES = sorted((ROOT / "recipes").iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass_the_parser_and_the_checks_of_their_main(path):
    """A recipe for main_pretrain_noprop.py says pretrain or noprop in its name; the others are for main_finetune.py."""
    main = pretrain if re.search("pretrain|noprop", path.name) else finetune
    options = main.get_options([f"@{path}"]).flat()
    text = re.sub(r"(?m)^#.*", "", path.read_text("utf-8"))
    assert set(re.findall(r"--(\w+)", text)) <= set(options)
    numbers = re.findall(r"--(\w+) ([-.\de]+)(?=\s+--|\s*$)", text)
    assert len(numbers) > 4 and all(options[k] in (float(v), [float(v)]) for k, v in numbers)


def test_recipes_that_are_named_exist():
    texts = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "results").rglob("*.md"), *RECIPES]
    named = {name for text in texts for name in re.findall(r"@recipes/([\w.]+args)", text.read_text("utf-8"))}
    assert len(named - {"x.args"}) >= 6 and named - {"x.args"} <= {path.name for path in RECIPES}
