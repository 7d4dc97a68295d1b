"""Join ES modules to one script, so that an HTML file needs no other file.

Each module becomes a function that returns its exports:

    import { h, s as svg } from "./dom.js";      const { h, s: svg } = dom_js;
    export function map() {}                     function map() {}  ...  return { map };

Only this subset of the language is supported: named imports from relative paths, exported
declarations and `export { a, b as c };`, each at the start of a line. Anything else is an error.
"""

import posixpath
import re
from pathlib import Path

_IMPORT = re.compile(r'^import\s*\{([^}]*)\}\s*from\s*"(\.{1,2}/[\w./-]+\.js)";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?=(?:(?:async )?function\*?|class|const) ([A-Za-z_$][\w$]*))", re.MULTILINE
)
_EXPORT_LIST = re.compile(r"^export\s*\{([^}]*)\};$", re.MULTILINE)
_UNSUPPORTED = re.compile(r"^\s*(?:import|export)\b.*|.*\bimport\s*[.(].*", re.MULTILINE)
_ENDS_SCRIPT = re.compile(r"</script|<!--", re.IGNORECASE)


def bundle(folder: Path, entry: str) -> str:
    """Return a script that runs the module with the path `entry` after those that it imports.

    Raises ValueError for a cycle, and for a form of import or export that is not supported.
    """
    done: dict[str, str] = {}
    _add(folder, entry, done, ())
    script = '"use strict";\n' + "\n".join(done.values())
    if _ENDS_SCRIPT.search(script):
        raise ValueError(f"{entry}: a script inside HTML must contain neither </script nor <!--")
    return script


def _add(folder: Path, name: str, done: dict[str, str], importers: tuple[str, ...]) -> None:
    """Add a module after those that it imports."""
    if name in done:
        return
    if name in importers:
        raise ValueError(f"{' imports '.join((*importers, name))}: imports must not form a cycle")
    source = (folder / name).read_text(encoding="utf-8")

    def resolve(match: re.Match[str]) -> str:
        return posixpath.normpath(posixpath.join(posixpath.dirname(name), match[2]))

    for match in _IMPORT.finditer(source):
        _add(folder, resolve(match), done, (*importers, name))
    code = _IMPORT.sub(
        lambda match: f"const {{{_renamed(match[1])}}} = {_variable(resolve(match))};", source
    )
    exports = [*(match[1] for match in _EXPORT.finditer(code))]
    code = _EXPORT.sub("", code)
    exports += [_exported(match[1]) for match in _EXPORT_LIST.finditer(code)]
    code = _EXPORT_LIST.sub("", code)
    unsupported = _UNSUPPORTED.search(_without_comments(code))
    if unsupported is not None:
        raise ValueError(f"{name}: cannot bundle {unsupported[0].strip()!r}")
    returned = f"return {{ {', '.join(exports)} }};"
    done[name] = f"const {_variable(name)} = (() => {{\n{code}\n{returned}\n}})();"


def _variable(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _renamed(names: str) -> str:
    """Return names of an import, `a, b as c`, as names of an object pattern."""
    return re.sub(r"(\w+)\s+as\s+(\w+)", r"\1: \2", names)


def _exported(names: str) -> str:
    """Return names of an export, `a, b as c`, as properties of an object."""
    return re.sub(r"(\w+)\s+as\s+(\w+)", r"\2: \1", names.strip().rstrip(","))


def _without_comments(code: str) -> str:
    """Return code without documentation comments, which may import types."""
    return re.sub(r"/\*.*?\*/|^\s*//.*$", "", code, flags=re.DOTALL | re.MULTILINE)
