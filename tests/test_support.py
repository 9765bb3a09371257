"""What the tests stand on: grids in one go, every second case, and the list of mutants."""

from __future__ import annotations

import re

import pytest

from tests.mutants import MUTANTS, ROOT
from tests.support import every, every_second


def test_all_cases_run_and_those_that_fail_are_named():
    seen = []

    @every("a", [1, 2, 3])
    @every(("b", "c"), [(4, 5), (6, 7)])
    def check(a, b, c, fixture):
        seen.append((a, b, c))
        assert fixture == "given"
        assert (a, b) not in ((2, 4), (3, 6)), "wrong"

    with pytest.raises(AssertionError) as caught:
        check(fixture="given")
    assert len(seen) == len(set(seen)) == 6
    said = str(caught.value)
    assert said.startswith("2 of 3 fail") and "a=1" not in said
    assert "a=2: 1 of 2 fail\nb=4, c=5: wrong" in said and "a=3: 1 of 2 fail\nb=6, c=7" in said
    seen.clear()
    every("a", [1])(lambda a: seen.append(a))()
    assert seen == [1]
    with pytest.raises(AssertionError, match="there is no case"):
        every("a", [])(lambda a: None)()


def test_of_three_lists_any_two_entries_meet_in_what_is_quick():
    lists = [range(3), "ab", range(4)]
    found = every_second(*lists)
    assert len({case.values for case in found}) == 24
    quick = [case.values for case in found if not case.marks]
    assert len(quick) == 12
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = {(case[i], case[j]) for case in quick}
        assert len(pairs) == len(lists[i]) * len(lists[j])


def test_every_mutant_is_a_change_of_a_text_that_is_there_once():
    assert len(MUTANTS) >= 10
    parts = {mutant.file.partition("/")[0] for mutant in MUTANTS}
    assert parts >= {"init", "nn", "graph", "manifolds"}
    for mutant in MUTANTS:
        text = (ROOT / "riemann_unn" / mutant.file).read_text()
        assert text.count(mutant.old) == 1 and mutant.new not in text, mutant
        assert mutant.tests
        for test in mutant.tests:
            file, _, name = test.partition("::")
            found = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {name or 'test_'}", found, re.MULTILINE), test
