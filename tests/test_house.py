"""What CONTRIBUTING.md says of files: each opens with what it is for."""

import ast
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "fastbert", "kernels", "tests")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_opens_with_what_it_is_for(folder: str) -> None:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert len(found) > 20
    for path in found:
        with tokenize.open(path) as file:
            said = ast.get_docstring(ast.parse(file.read()))
        assert said, f"{path} does not say what it is for"
        assert said.partition("\n\n")[0].endswith((".", "?", ":")), f"{path}: {said[:80]}"
