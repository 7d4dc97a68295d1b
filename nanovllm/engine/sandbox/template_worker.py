"""Compile one chat template by Jinja, in its sandbox, and render messages with it.

    -> load     memory_bytes, cpu_s; body: source           <- loaded | invalid: message
    -> render   messages, special_tokens, max_characters,   <- rendered: spans; body: text
                cpu_s, add_generation_prompt,               <- refused: message | failed: message
                continue_final_message

`spans` are the ranges of characters that the template wrote: its text and strings, its special
tokens and the names of roles, a fixed set; see provenance.py. Constant expressions are evaluated
when rendering, not when compiling.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.engine.sandbox import limits
from nanovllm.engine.sandbox.messages import Channel
from nanovllm.engine.sandbox.provenance import Text, joined, spans_of, written

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class RefusalError(Exception):
    """The template refuses these messages."""


def serve(channel: Channel) -> None:
    """Compile the template of the first message, then render until the socket closes."""
    received = channel.receive()
    if received is None:
        return
    header, source = received
    environment = Environment()
    limits.limit_memory(header["memory_bytes"])
    try:
        with limits.limited_cpu(header["cpu_s"]):
            template = environment.from_string(source.decode("utf-8", "surrogatepass"))
        channel.send({"op": "loaded"})
        while (received := channel.receive()) is not None:
            _reply(channel, template, received[0])
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
        channel.send({"op": "invalid", "message": str(error)})


def _reply(channel: Channel, template: Any, header: Mapping[str, Any]) -> None:
    try:
        with limits.limited_cpu(header["cpu_s"]):
            text = _render(template, header)
            body = text.encode("utf-8", "surrogatepass")
    except RefusalError as error:
        channel.send({"op": "refused", "message": str(error)})
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        channel.send({"op": "failed", "message": str(error)})
    else:
        channel.send({"op": "rendered", "spans": spans_of(text)}, body)


def _render(template: Any, header: Mapping[str, Any]) -> str:
    messages = [
        {**message, "role": written(message["role"])} if message.get("role") in _ROLES else message
        for message in header["messages"]
    ]
    special_tokens = {name: written(text) for name, text in header["special_tokens"].items()}
    tag = secrets.token_hex(16).upper() if header["continue_final_message"] else ""
    if tag:
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}{tag} "}
    values = {
        **special_tokens, "messages": messages, "tools": None, "documents": None,
        "add_generation_prompt": header["add_generation_prompt"],
    }  # fmt: skip
    pieces: list[str] = []
    size, limit = 0, header["max_characters"]
    for piece in template.generate(values):
        size += len(piece)
        if size > limit:
            raise RefusalError(
                f"the chat template renders more than {limit} characters; send fewer messages"
            )
        pieces.append(piece)
    text = joined(pieces)
    return _open_ended(text, header["messages"][-1]["content"], tag) if tag else text


def _open_ended(text: Text, content: str, tag: str) -> str:
    """Return the text up to the end of its last message.

    In `text` the message is followed by the tag and a space. As with transformers'
    `continue_final_message`, white space before the tag is removed if the template removed the
    space after it.
    """
    end = text.rfind(tag)
    if end < 0 or content.strip() not in text:
        raise RefusalError(
            "continue_final_message is true, but the chat template does not write the last message "
            "unchanged; leave it out"
        )
    begun = text[:end]
    return begun if text.startswith(" ", end + len(tag)) else begun.rstrip()


class _Generation(Extension):
    """A block around the assistant's text, which training tools look for: a scope of variables."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's type

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a block."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _CodeGenerator(CodeGenerator):
    """Writes the template's strings as `Text`, and evaluates no expressions when compiling."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802 - Jinja's
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str):
            self.write(self._text(value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:  # noqa: N802
        self.write(self._text(node.data))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat(map(str, (")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")))")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._text("".join(group))

    def _text(self, value: str) -> str:
        """Return the Python code of a string of the template."""
        strings: list[Text] = self.environment.strings  # type: ignore[attr-defined]
        strings.append(written(value))
        return f"environment.strings[{len(strings) - 1}]"


class Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers gives a template; for one template."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.strings: list[Text] = []
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now


@pass_environment
def _join(
    environment: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    """Jinja's filter, with marks propagated."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return Text(d, spans_of(d)).join(map(str, value))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise RefusalError(f"the chat template refuses the messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.now(timezone.utc).astimezone().strftime(form)
