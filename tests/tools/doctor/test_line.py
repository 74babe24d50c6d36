"""Lines and the report: what is wrong comes with advice, and the sum is that of the lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tierrun.tools.doctor.line import Area, Line, Report, Status

AREA = Area("somewhere")
words = st.text(min_size=1)

lines = st.lists(
    st.one_of(
        st.builds(AREA.ok, words, words),
        st.builds(AREA.unknown, words, words),
        st.builds(AREA.warn, words, words, words),
        st.builds(AREA.fail, words, words, words),
    )
)


@given(found=lines)
def test_the_exit_code_is_that_of_the_worst_line(found: list[Line]) -> None:
    report = Report.of(found, "1.0", 0.5)
    failed = any(line.status == "fail" for line in found)
    warned = any(line.status == "warn" for line in found)
    assert report.exit_code(strict=False) == int(failed)
    assert report.exit_code(strict=True) == int(failed or warned)
    assert report.status == ("fail" if failed else "warn" if warned else "ok")


@given(found=lines)
def test_a_report_survives_json(found: list[Line]) -> None:
    report = Report.of(found, "1.0", 0.5)
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(("status", "advice"), [("warn", None), ("fail", ""), ("ok", "do this")])
def test_what_is_wrong_comes_with_advice_and_nothing_else_does(
    status: str, advice: str | None
) -> None:
    with pytest.raises(ValidationError):
        Line(area="a", name="n", status=Status(status), value="v", advice=advice)


@pytest.mark.parametrize(
    "change", [{"status": "ok"}, {"version": 2}, {"more": 1}, {"lines": [{"name": "x"}]}]
)
def test_a_document_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    document = json.loads(Report.of([AREA.fail("n", "v", "a")], "1.0", 0.5).model_dump_json())
    with pytest.raises(ValidationError):
        Report.model_validate(document | change)
