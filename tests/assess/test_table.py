"""The assessment as tables in the terminal."""

from typing import Any

from saemill.assess.sums import absent
from saemill.assess.table import by_source, unknown_by_source


def figures(fvu: float | None, delta_ce: float | None) -> dict[str, Any]:
    """FVU and ΔCE as given, of which one that is not there was not measured, and an L0 that goes with FVU."""
    known = {"fvu": fvu, "l0": fvu and 8.0, "delta_ce": delta_ce}
    return {
        name: absent("not measured") if value is None else {"value": value} for name, value in known.items()
    }


def entry(name: str, delta_ce: float | None, **by_source: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "metrics": figures(0.1, delta_ce), "by_source": by_source}


def test_sources_of_which_nothing_is_known_are_left_out_and_named() -> None:
    """Oracle: rows and sentences by hand, of a source without tokens, one without losses, and no losses at
    all; an SAE without any figure has no rows."""
    a = entry("a", 0.3, books=figures(0.2, 0.3), mails=figures(None, None), notes=figures(0.4, None))
    assert by_source([a]) == [
        ["variant", "source", "FVU", "L0", "ΔCE nats"],
        ["a", "books", "0.200", "8.000", "0.300"],
        ["a", "notes", "0.400", "8.000", "–"],
    ]
    assert unknown_by_source([a]) == [
        "no FVU, L0, ΔCE nats on mails: not measured",
        "no ΔCE nats on notes: not measured",
    ]
    without_model = entry("b", None, books=figures(0.2, None), notes=figures(0.4, None))
    assert by_source([without_model]) == [
        ["variant", "source", "FVU", "L0"],
        ["b", "books", "0.200", "8.000"],
        ["b", "notes", "0.400", "8.000"],
    ]
    assert unknown_by_source([without_model]) == []
    assert by_source([entry("c", None, books=figures(None, None), notes=figures(None, None))]) == []
