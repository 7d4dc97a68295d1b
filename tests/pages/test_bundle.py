"""ES modules joined to one script."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nanovllm.pages.bundle import bundle


def write(folder: Path, **modules: str) -> None:
    for name, source in modules.items():
        (folder / f"{name}.js").write_text(source, encoding="utf-8")


def test_modules_run_before_those_that_import_them(tmp_path: Path) -> None:
    write(
        tmp_path,
        low='export const name = "low";\nexport async function later() {}\n',
        middle='import { name as of } from "./low.js";\n'
        "function shout() { return of.toUpperCase(); }\nexport { shout as loud };\n",
        main='/** @type {import("./low.js").Thing} */\nimport {\n  loud,\n} from "./middle.js";\n'
        'import { name } from "./low.js";\nconsole.log(name, loud());\n',
    )
    script = bundle(tmp_path, "main.js")
    assert script.index("const low_js") < script.index("const middle_js")
    assert script.count("const low_js") == 1
    assert "const { name: of } = low_js;" in script
    assert "return { name, later };" in script
    assert "return { loud: shout };" in script
    node = shutil.which("node")
    if node is not None:
        command = [node, "-e", script]
        assert (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            == "low LOW\n"
        )


def test_imports_are_relative_to_the_folder_of_their_module(tmp_path: Path) -> None:
    for folder in ("parts", "views"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "parts", low="export const low = 1;\n")
    write(
        tmp_path / "views", low='import { low } from "../parts/low.js";\nexport const high = low;\n'
    )
    write(tmp_path, main='import { high } from "./views/low.js";\nconsole.log(high);\n')
    script = bundle(tmp_path, "main.js")
    assert script.index("const parts_low_js") < script.index("const views_low_js")
    assert "const { low } = parts_low_js;" in script
    assert "const { high } = views_low_js;" in script


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('import * as all from "./a.js";', "cannot bundle 'import"),
        ("export default 1;", "cannot bundle 'export default"),
        ('const page = await import("./a.js");', "cannot bundle"),
        ("const here = import.meta.url;", "cannot bundle"),
        ('const end = "</SCRIPT>";', "neither </script"),
        (
            'import { a } from "./main.js";',
            "main.js imports main.js: imports must not form a cycle",
        ),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, source: str, message: str) -> None:
    write(tmp_path, main=source)
    with pytest.raises(ValueError, match=message):
        bundle(tmp_path, "main.js")
