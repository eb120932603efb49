"""Result files as one page with pictures: `fastbert bench report`.

Every section stands for one kind of measurement; what could not be shown is said at the end.
"""

from collections.abc import Sequence
from pathlib import Path

from fastbert.errors import UserError
from fastbert_bench.config import ReportConfig
from fastbert_bench.report.files import TITLES, Result, load, load_commit
from fastbert_bench.report.page import Page
from fastbert_bench.report.readme import write_readme
from fastbert_bench.report.sections import SECTIONS, comparison, sweeps


def page_of(
    results: Sequence[Result],
    refused: Sequence[str] = (),
    old: Sequence[Result] | None = None,
    against: str = "",
) -> Page:
    """The whole page.

    Args:
        results: what to show.
        refused: a line for each file that is no result.
        old: what to compare with, if anything.
        against: the name of `old`.
    """
    page = Page("fastbert: measurements")
    page.heading(2, "Files")
    page.table(
        ("file", "measures", "device", "commit", "date"),
        [(one.file, TITLES[one.kind], one.device, one.conditions["commit"], one.date)
         for one in results],
    )  # fmt: skip
    page.text("Bars are medians, whiskers go from the 20th to the 80th percentile of the rounds. "
              "Padding never counts as work.")  # fmt: skip
    if refused:
        page.text("Refused:")
        page.bullets(refused)
    if old is not None:
        comparison(page, old, results, against)
    for kind, title in TITLES.items():
        of_kind = [result for result in results if result.kind == kind]
        if of_kind:
            page.heading(2, title)
        for result in of_kind:
            SECTIONS[kind](page, result)
    sweeps(page, results)
    page.heading(2, "Missing")
    there = {result.kind for result in results}
    page.bullets(f"{title}: no file." for kind, title in TITLES.items() if kind not in there)
    gaps = [(one["name"], one["why"], result.file) for result in results for one in result.missing]
    if gaps:
        page.table(("", "why", "file"), gaps)
    return page


def main(config: ReportConfig, paths: Sequence[str]) -> None:
    """Writes the page and its pictures, and the README's section where asked; prints where.

    Raises:
        UserError: a file is no result, a commit is unknown, or nothing can be written there.
    """
    if config.readme:
        print(write_readme())
    if not paths:
        return
    results, refused = load(paths)
    old = None
    if config.against:
        old, more = (
            load([config.against])
            if Path(config.against).exists()
            else load_commit(config.against, paths)
        )
        refused = [*refused, *more]
    page = page_of(results, refused, old, config.against)
    try:
        print(page.write(Path(config.out)))
    except OSError as error:
        raise UserError(f"out = {config.out!r}: cannot be written: {error.strerror}") from None
