"""ChatPrompts: from the messages of a Python program to token ids, by the server's templates."""

import os
from pathlib import Path
from typing import Any

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams


class ChatPrompts:
    """Makes prompts of the conversations with one model. Any thread may use it."""

    def __init__(self, folder: Path, input_processor: InputProcessor) -> None:
        """Read templates and special tokens from the model's `folder` when they are needed."""
        self._folder = folder
        self._input_processor = input_processor
        self._latest: ChatTemplate | None = None

    def close(self) -> None:
        """End the process that renders the latest template. Harmless twice."""
        if self._latest is not None:
            self._latest.close()

    def template(self, given: str | os.PathLike[str] | None = None) -> ChatTemplate:
        """Return the template whose text or file is `given`, by default the model's own.

        The latest one is kept, and with it the process that renders it. Raises InvalidRequestError
        where there is none, CheckpointError where a file cannot be used.
        """
        if isinstance(given, str):
            if "{" not in given:
                raise InvalidRequestError(
                    f"chat_template is {given[:80]!r}, which inserts no message; give the text of a "
                    "Jinja template, or pathlib.Path(...) for a file with one",
                    param="chat_template",
                )
            found = ChatTemplate.load(self._folder, source=given)
        else:
            found = ChatTemplate.load(self._folder, None if given is None else Path(given))
        if found is None:
            raise InvalidRequestError(
                f"{self._folder.name} has no chat template; give one by chat_template, or send a "
                "prompt to generate",
                param="messages",
            )
        latest = self._latest
        if latest is None or (latest.source, latest.special_tokens) != (
            found.source,
            found.special_tokens,
        ):
            latest = self._latest = found
        return latest

    def encode(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the prompt's token ids; arguments and errors are those of ChatTemplate.encode."""
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt cannot both be true; set "
                "add_generation_prompt to false",
                param="continue_final_message",
            )
        return template.encode(
            messages,
            self._input_processor.tokenizer,
            self._input_processor.check_text,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def params(self, template: ChatTemplate, params: SamplingParams) -> SamplingParams:
        """Return the settings with the template's end of a turn among the stop tokens."""
        end = template.end_of_turn_id(self._input_processor.tokenizer)
        if end is None or end >= self._input_processor.model.vocab or params.ignore_eos:
            return params
        return params.clone(stop_token_ids=[*(params.stop_token_ids or ()), end])
