"""The table of odd inputs and faults: its numbers are those of stored results, of tests that there are."""

import ast
import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("robustness", ROOT / "docs" / "robustness.py")
robustness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(robustness)

TESTS = sorted({test for kind in robustness.KINDS.values() for part in kind[1:] for test in part})
RESULTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_x[1]"/><testcase classname="tests.test_a" name="test_x[2]"/>
<testcase classname="tests.test_a" name="test_x[3]"><failure>late</failure></testcase>
<testcase classname="tests.b.test_c" name="test_y"><skipped/></testcase>
<testcase classname="tests.b.test_c" name="test_z[a]"><properties>
<property name="counts" value='{"works": 5, "refused": 3}'/></properties></testcase>
<testcase classname="tests.b.test_c" name="test_z[b]"><properties>
<property name="counts" value='{"refused": 4, "late": 1, "traceback": 2}'/></properties><failure/></testcase>
<testcase classname="tests.stress.test_flag_fuzz" name="test_odd_values_are_refused_in_one_line_or_work[plan]">
<error/></testcase>
</testsuite></testsuites>"""


def test_every_test_of_the_table_is_there():
    assert len(TESTS) > 100
    for file in {name.partition("::")[0] for name in TESTS}:
        there = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert {name.partition("::")[2] for name in TESTS if name.startswith(f"{file}::")} <= there, file


def test_the_page_is_made_of_the_stored_results():
    stored = json.loads(robustness.STORED.read_text())
    assert robustness.PAGE.read_text(encoding="utf-8") == robustness.page(stored)
    assert {name.partition("[")[0] for name in stored} <= set(TESTS)


def test_results_are_counted(tmp_path):
    (tmp_path / "a.xml").write_text(RESULTS)
    found = robustness.read(str(tmp_path / "a.xml"))
    assert found["tests/test_a.py::test_x"] == {"passed": 2, "failed": 1} and len(found) == 4
    x, z = "tests/test_a.py::test_x", "tests/b/test_c.py::test_z"
    assert robustness.counts(robustness.Kind("", right=(x,)), found) == (2, 0, 1)
    assert robustness.counts(robustness.Kind("", refused=(x,), counted=(z,)), found) == (5, 9, 4)
    assert robustness.counts(robustness.KINDS["commands and configs"], found) == (0, 0, 1), "ended too early to count"
    assert robustness.counts(robustness.Kind("", right=("tests/unknown.py::test_x",)), found) == (0, 0, 0)
