"""How far results are from the stored ones: in the message of a failed test, and in a table at the end of the run.

A test's differences travel with its report (``record_property``), so that they also arrive from pytest-xdist's workers.
"""

from __future__ import annotations

PROPERTY = "difference"
ORDER = ("float32", "official int8", "official int4", "bfloat16", "float16")


def pytest_terminal_summary(terminalreporter) -> None:
    """The largest difference of each generation in each precision, and where it was."""
    largest: dict[tuple[str, str], tuple[float, str, str]] = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == PROPERTY:
                generation, precision, size, unit, where = value
                key = generation, precision
                largest[key] = max(largest.get(key, (-1.0, "", "")), (size, unit, where))
    if not largest:
        return
    terminalreporter.section("largest differences to the stored results")
    for generation, precision in sorted(largest, key=lambda key: (key[0], ORDER.index(key[1]))):
        size, unit, where = largest[generation, precision]
        terminalreporter.write_line(f"{generation:24} {precision:14} {size:8.1e} {unit:5} {where}")
