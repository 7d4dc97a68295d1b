r"""Translate GBNF, llama.cpp's notation of grammars, to llguidance's Lark.

    root   ::= "select " column (", " column)*     # the start rule is `root`
    column ::= [a-z_] [a-z0-9_]{0,30} | "*"

vLLM's EBNF is the same notation. llguidance splits text into lexemes and always takes the longest.
In the output of its own `llguidance.gbnf_to_lark`, nothing matches `name "b"` where a name may
contain a b. Here every lexeme is a single character, and none is a prefix of another. So the
translation describes exactly the language of the original.

https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

import json
import re

_RULE = r"(?P<rule>[\w-]+)\s*::="
_LOOKS_LIKE_GBNF = re.compile(rf"(?m)^[ \t]*{_RULE}")
_TOKENS = re.compile(
    rf"""
    (?P<space>\s+|\#[^\n]*)
    | {_RULE}
    | (?P<name>[\w-]+)
    | (?P<literal>"(?:[^"\\]|\\.)*")
    | (?P<characters>\[(?:[^\]\\]|\\.)*\])
    | (?P<any>\.)
    | (?P<repeat>[*+?]|\{{\s*\d+\s*(?:,\s*\d*\s*)?\}})
    | (?P<symbol>[|()])
    """,
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r"\\x(?P<x>[0-9a-fA-F]{2})|\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})"
    r"|\\(?P<escaped>[^0-9A-Za-z]|[nrt])|(?P<plain>[^\\])",
    re.DOTALL,
)
_ZERO_TIMES = re.compile(r"\{\s*0+\s*(?:,\s*0+\s*)?\}")  # not supported by Lark
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}


def is_gbnf(text: str) -> bool:
    """Return whether a grammar defines rules by `::=`, which Lark does not have."""
    return _LOOKS_LIKE_GBNF.search(text) is not None


def gbnf_to_lark(text: str) -> str:
    """Return the grammar in Lark's notation. Raises ValueError that names the invalid line."""
    return _Translation(text).lark()


class _Translation:
    """Translates from left to right, to one line per rule."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._rules: dict[str, list[str]] = {}
        self._uses: dict[str, int] = {}  # {name: position of its first use}
        self._output: list[str] = []
        self._open: list[int] = []  # positions of the open parentheses in the output
        self._item = 0  # position in the output of the latest item
        self._can_repeat = False  # after an item without a repetition
        self._is_empty = False  # the current alternative has no item yet

    def lark(self) -> str:
        """Return the translation."""
        while self._position < len(self._text):
            match = _TOKENS.match(self._text, self._position)
            if match is None or match.lastgroup is None:
                shown = json.dumps(self._text[self._position :][:20], ensure_ascii=False)
                raise self._error(f"cannot read {shown}")
            if match.lastgroup != "space":
                self._take(match.lastgroup, match[match.lastgroup])
            self._position = match.end()
        self._end_rule()
        if "root" not in self._rules:
            raise ValueError("grammar: it has no rule root, which is the start rule")
        for name, position in self._uses.items():
            if name not in self._rules:
                self._position = position
                raise self._error(f"the rule {name} is not defined")
        names = {name: f"rule{i}" for i, name in enumerate(self._rules)} | {"root": "start"}
        return "\n".join(
            f"{names[rule]}: {' '.join(names.get(item, item) for item in items)}"
            for rule, items in self._rules.items()
        )

    def _take(self, kind: str, value: str) -> None:
        """Translate one token of the text."""
        if kind == "rule":
            self._begin_rule(value)
        elif not self._rules:
            raise self._error(f"a rule must come first, not {value}")
        elif kind == "symbol":
            self._take_symbol(value)
        elif kind == "repeat":
            if not self._can_repeat:
                raise self._error(f"there is nothing to repeat before {value}")
            if _ZERO_TIMES.fullmatch(value):
                self._output[self._item :] = ['""']
            else:
                self._output.append(re.sub(r"\s", "", value))
            self._can_repeat = False
        else:
            if kind == "name":
                self._uses.setdefault(value, self._position)
            elif kind == "literal":
                value = self._literal(value[1:-1])
            else:
                value = "/(?s:.)/" if kind == "any" else self._class(value[1:-1])
            self._item = len(self._output)
            self._output.append(value)
            self._can_repeat, self._is_empty = True, False

    def _begin_rule(self, name: str) -> None:
        self._end_rule()
        if name in self._rules:
            raise self._error(f"the rule {name} is defined twice")
        self._output = self._rules[name] = []
        self._is_empty, self._can_repeat = True, False

    def _end_rule(self) -> None:
        if self._open:
            raise self._error("a ) is missing before this")
        self._end_alternative()

    def _end_alternative(self) -> None:
        if self._is_empty:
            self._output.append('""')
        self._is_empty = False

    def _take_symbol(self, symbol: str) -> None:
        if symbol == "(":
            self._open.append(len(self._output))
        else:
            if symbol == ")" and not self._open:
                raise self._error("a ) has no (")
            self._end_alternative()
            if symbol == ")":
                self._item = self._open.pop()
        self._output.append(symbol)
        self._can_repeat, self._is_empty = symbol == ")", symbol != ")"

    def _literal(self, text: str) -> str:
        """Return a text as one lexeme per character."""
        items = [_lexeme(code) for code, _ in self._characters(text)] or ['""']
        return items[0] if len(items) == 1 else f"({' '.join(items)})"

    def _class(self, text: str) -> str:
        """Return a character class as a regular expression."""
        is_negated = text.startswith("^")
        characters = self._characters(text[is_negated:])
        if not characters:
            if is_negated:
                return "/(?s:.)/"
            raise self._error("[] matches no character")
        ranges, i = "", 0
        while i < len(characters):
            first = last = characters[i][0]
            i += 1
            if i + 1 < len(characters) and characters[i] == (ord("-"), False):
                last = characters[i + 1][0]
                i += 2
            if last < first:
                raise self._error(f"the range [{text}] ends before it begins")
            ranges += f"\\u{{{first:x}}}-\\u{{{last:x}}}"
        return f"/[{'^' if is_negated else ''}{ranges}]/"

    def _characters(self, text: str) -> list[tuple[int, bool]]:
        """Return each character's code point, and whether it is written as an escape."""
        characters: list[tuple[int, bool]] = []
        position = 0
        while position < len(text):
            match = _CHARACTER.match(text, position)
            if match is None or match.lastgroup is None:
                shown = json.dumps(text[position:][:10], ensure_ascii=False)[1:-1]
                raise self._error(f"{shown.replace(chr(92) * 2, chr(92))} is not a valid escape")
            kind, value = match.lastgroup, match[match.lastgroup]
            code = int(value, 16) if kind in "xuU" else ord(_CONTROLS.get(value, value)[0])
            if kind == "plain":
                code = ord(value)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise self._error(f"{match[0]} is not a character")
            characters.append((code, kind != "plain"))
            position = match.end()
        return characters

    def _error(self, message: str) -> ValueError:
        """Return the error at the current position."""
        line = self._text.count("\n", 0, self._position) + 1
        return ValueError(f"grammar, line {line}: {message}")


def _lexeme(code: int) -> str:
    """Return a character in Lark's notation. Lark's strings cannot contain DEL."""
    return r"/\u{7f}/" if code == 0x7F else json.dumps(chr(code), ensure_ascii=False)
