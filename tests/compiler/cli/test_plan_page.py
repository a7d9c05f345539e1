"""The page of a plan: one file that needs no other, with a plot for each question, and the same text for the same plan."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from moec.compiler.cli.plan import plan_lines
from moec.compiler.cli.plan_page import plan_page
from moec.compiler.errors import MoecError
from moec.targets.serving.experts import place_by_load
from moec.targets.serving.plan import Request, make_plan
from workload_for_tests import EXPERTS, LAYERS, small_workload


@pytest.fixture(scope="module")
def plan():
    found = make_plan(small_workload(), Request(on="hgx-h200", batch=16, ep=8))
    loads = [[1 + 20 * (e == layer) for e in range(EXPERTS)] for layer in range(LAYERS)]
    slots = place_by_load(loads, 8, 8).slots
    found["experts"] |= {"copies": 8, "physical_to_logical": [list(row) for row in slots]}
    return {**found, "model": "a <small> & model"}


def test_a_page_stands_alone(plan):
    pytest.importorskip("matplotlib")
    page = plan_page(plan, plan_lines(plan))
    assert page == plan_page(plan, plan_lines(plan))
    assert "a &lt;small&gt; &amp; model on hgx-h200" in page and "first token" in page
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(plots) == 5
    texts = [{t.text for t in ElementTree.fromstring(plot).iter("{http://www.w3.org/2000/svg}text")} for plot in plots]
    assert set(plan["parts_ms"]) <= texts[0]
    assert any(text and text.startswith("weights ") for text in texts[1])
    assert {str(row["batch"]) for row in plan["pareto"]} <= texts[2]
    assert {"bf16", "the plan"} <= texts[3] and "expert" in texts[4]
    links = re.findall(r'(?:src|href)="([^"]*)"', page.replace("xlink:href", "href"))
    assert all(link.startswith(("#", "data:")) for link in links)  # within the page


def test_without_matplotlib_it_says_what_to_install(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MoecError, match="plots need matplotlib") as error:
        plan_page(plan, plan_lines(plan))
    assert "moec[plots]" in error.value.todo
