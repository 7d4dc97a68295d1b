"""Chat templates that several test files render."""

from collections.abc import Mapping

from nanovllm.engine.chat.template import ChatTemplate

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_TEMPLATE = ChatTemplate(CHATML, "test")
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]


def one_of(sources: Mapping[str, str]) -> ChatTemplate:
    """Return a template that runs the source named by `case` in the first message."""
    cases = (
        f"{{% if messages[0].case == '{name}' %}}{source}{{% endif %}}"
        for name, source in sources.items()
    )
    return ChatTemplate("".join(cases), "test")
