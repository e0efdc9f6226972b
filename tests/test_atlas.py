"""The map of the book agrees with the modules, with the chapters, and with the list in README."""

import re
from pathlib import Path

from minids.learn.atlas import Place, atlas

ROOT = Path(__file__).parents[1]


def test_a_place_reads_as_a_line():
    place = Place(("04_mla", "05_absorb"), "mla.py", "section 2.1.1, Eqs. 1-11")
    assert str(place) == "04 mla, 05 absorb  mla.py         section 2.1.1, Eqs. 1-11"


def test_places_are_those_of_the_docstrings():
    places = {place.module: place for place in atlas()}
    assert places["router.py"].chapters == ("07_moe",)
    assert places["mla.py"].chapters == ("04_mla", "05_absorb")
    assert places["mtp.py"].report == "section 2.2, Eqs. 21-25"
    for module, place in places.items():
        text = (ROOT / "minids" / module).read_text(encoding="utf-8")
        assert all(f"book/{name}.ipynb" in text for name in place.chapters)
        assert place.report in text


def test_modules_that_the_report_does_not_describe_are_left_out():
    assert not {"cli.py", "checkpoint.py", "resume.py", "__init__.py"} & {p.module for p in atlas()}


def test_chapters_on_the_map_are_in_the_plan():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    plan = {f"{n}_{stem}" for n, stem in re.findall(r"^\| (\d\d) \| (\w+) \|", readme, re.M)}
    assert {name for place in atlas() for name in place.chapters} <= plan
    assert [place.chapters for place in atlas()] == sorted(place.chapters for place in atlas())
