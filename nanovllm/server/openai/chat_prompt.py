"""The prompt that a checkpoint's chat template makes of messages."""

from collections.abc import Callable, Sequence

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.openai.chat_schemas import ChatMessage, PromptFields

_REMEDY = (
    "send a prompt to /v1/completions instead, or give --chat-template plain (or a Jinja file) at "
    "the start"
)


def encode_messages(
    messages: Sequence[ChatMessage],
    fields: PromptFields,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    check_text: Callable[[str], None],
    *,
    add_special_tokens: bool = False,
) -> list[int]:
    """Return the token ids of the prompt.

    Args:
        messages: the conversation.
        fields: how the prompt ends.
        template: the checkpoint's; None where it has none.
        tokenizer: the model's.
        check_text: may refuse the prompt's text before it is tokenized.
        add_special_tokens: add the tokens that the tokenizer puts around a text.

    Raises:
        InvalidRequestError: there is no template, it is not valid, or it refuses the messages; and
            what `check_text` raises.
    """
    if template is None:
        raise InvalidRequestError(
            f"the model has no chat template, so its messages cannot be put together; {_REMEDY}",
            param="messages",
        )
    try:
        return template.encode(
            [message.model_dump(exclude_none=True) for message in messages],
            tokenizer,
            check_text,
            end=fields.prompt_end,
            add_special_tokens=add_special_tokens,
        )
    except CheckpointError as error:
        raise InvalidRequestError(f"{error}; {_REMEDY}", param="messages") from error


def end_turn(
    params: SamplingParams, template: ChatTemplate | None, engine: Engine
) -> SamplingParams:
    """Return `params` with what ends a turn of the template; unchanged without one."""
    if template is None:
        return params
    return template.end_turn(params, engine.tokenizer, engine.model.vocab)
