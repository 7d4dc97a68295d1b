"""GBNF grammars of llama.cpp and vLLM, translated to Lark, accept exactly their texts."""

import llguidance
import pytest

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.sandbox.gbnf import gbnf_to_lark, is_gbnf
from nanovllm.engine.sandbox.grammar_worker import describe_error
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import check_texts, compiled

SQL = """
root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""
JSON = r"""
# llama.cpp's grammars/json.gbnf
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
CASES: dict[str, tuple[list[str], list[str]]] = {
    # grammar: (texts that it allows, texts that it does not)
    SQL: (["SELECT col_1  from table_2  where col_2 = 1 "], ["SELECT col_1 "]),
    JSON: (['{"a": [1, 2.5e-3, true], "b\\n": {"c": "\\u00e9\\""}}', "{}"], ['{"a" 1}', "[1]"]),
    'root ::= word "b"\nword ::= [a-z]+': (["ab", "abb", "xyzb"], ["b", "ba"]),
    'root ::= [a-z]* "end"': (["end", "enend", "endend"], ["en", "ende"]),
    'root ::= x "c"\nx ::= "a" | "ab" | "abcd"': (["ac", "abc", "abcdc"], ["abcd"]),
    'root ::= ("ab" | )* "abc" | \n': (["", "abc", "ababc"], ["ab"]),
    'root ::= Item-x\n | "q"\nItem-x ::= "a" | "b" Item-x # "\nstart ::= "y"': (
        ["a", "bba", "q"],
        ["y", "b"],
    ),
    'root ::= "a"{ 2 , 3 } ("bc"){2} "d"{1,} "" "x"?': (["aabcbcd", "aaabcbcddx"], ["abcbcd"]),
    r'root ::= [à-ü]{2} . "\u00e9\x41\U0001F600" [^\]\n-] [a\-z] [-a] [^]': (
        ["éà\néA😀xz-\n", "éàqéA😀é-a."],
        ["éà\néA😀--a.", "éà\néA😀xba."],
    ),
    r'root ::= list' + "\n" + r'list ::= list "," [\[\]/^\\&] | "\"\\\[\]\t"': (
        ['"\\[]\t,/,&,^,]', '"\\[]\t,\\'],
        [",a"],
    ),
    r'root ::= "\x7f\x01" [\x7f]': (["\x7f\x01\x7f"], ["\x7f\x01"]),
    'root ::= "a" "b"{0} ("c" ("d" | "e")){ 0 , 0 } | "x"{00}': (["a", ""], ["ab", "acd", "x"]),
}  # fmt: skip


@pytest.mark.parametrize("grammar", CASES)
def test_a_grammar_allows_its_texts_and_no_other(
    grammars: Grammars, tokenizer: Tokenizer, grammar: str
) -> None:
    check_texts(grammars, tokenizer, StructuredOutputs(grammar=grammar), *CASES[grammar])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('main ::= "a"', "it has no rule root, which is the start rule"),
        ('root ::= "a"\n  | b c', "line 2: the rule b is not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2: the rule root is defined twice"),
        ('root ::= ("a" | "b"\nb ::= "c"', "line 2: a ) is missing before this"),
        ('root ::= "a")', "line 1: a ) has no ("),
        ('root ::= "a', 'line 1: cannot read "'),
        ("root ::= <word>", 'line 1: cannot read "<word>"'),
        ('"a"\nroot ::= "b"', 'line 1: a rule must come first, not "a"'),
        ('root ::= "a" (*)', "line 1: there is nothing to repeat before *"),
        ('root ::= "a"*+', "line 1: there is nothing to repeat before +"),
        (r'root ::= "\q"', r"line 1: \q is not a valid escape"),
        (r'root ::= "\ud800"', r"line 1: \ud800 is not a character"),
        (r"root ::= [\U00110000]", r"line 1: \U00110000 is not a character"),
        ("root ::= [z-a]", "line 1: the range [z-a] ends before it begins"),
        ("root ::= []", "line 1: [] matches no character"),
    ],
)
def test_an_error_names_the_line_and_what_is_wrong(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^grammar") as caught:
        gbnf_to_lark(grammar)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= b", "grammar, line 1: the rule b is not defined"),
        ("root ::= " + "(" * 40 + '"a"' + ")" * 40, "the grammar is nested too deeply"),
    ],
)
def test_an_error_is_the_requests(grammars: Grammars, grammar: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"cannot be used: {message}") as caught:
        compiled(grammars, StructuredOutputs(grammar=grammar))
    assert caught.value.param == "structured_outputs"


def test_an_error_of_the_library_does_not_quote_the_translation(tokenizer: Tokenizer) -> None:
    """A long text is as many symbols, which the library counts."""
    vocab = tokenizer.vocab
    library = llguidance.LLTokenizer(tokenizer.as_json(), n_vocab=vocab, eos_token=[vocab - 1])
    limits = llguidance.LLParserLimits(max_grammar_size=100)
    text = llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(f'root ::= "{"ab" * 300}"'))
    matcher = llguidance.LLMatcher(library, text, log_level=0, limits=limits)
    assert "start:" in matcher.get_error()
    assert describe_error(matcher.get_error()) == "the grammar is too large; make it smaller"
    assert describe_error("unclosed group") == "unclosed group"


def test_lark_is_not_taken_for_gbnf() -> None:
    assert not is_gbnf('// root ::= a\nstart: "a ::= b"\n')
    assert is_gbnf('# comment\n  root-x\n    ::= "a"')
