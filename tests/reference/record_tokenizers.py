"""Record what transformers encodes, decodes and renders with the tokenizers of the families.

    PYTHONPATH=. python tests/reference/record_tokenizers.py

needs transformers (not torch) and jinja2, and writes recorded_tokenizers.json beside this file.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from tests.reference.chats import CHATS, ENCODED, PIPELINES, template_source
from tests.support.family_tokenizers import FAMILIES, TEXTS

FOLDER = Path(__file__).parent


def texts_of(tokenizer: Any) -> list[dict[str, Any]]:
    """Return the ids of each text, with names of special tokens as text and as tokens; texts.

    `num_around` is the number of tokens around the text.
    """
    recorded = []
    for text in TEXTS:
        ids = tokenizer(text, split_special_tokens=True).input_ids
        plain = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
        recorded.append(
            {
                "ids": ids, "num_around": len(ids) - len(plain),
                "special_ids": tokenizer(text).input_ids,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "special_text": tokenizer.decode(ids, skip_special_tokens=False),
            }
        )  # fmt: skip
    return recorded


def chats_of(tokenizer: Any, template: str) -> dict[str, Any]:
    """Return the rendered text and the token ids of each conversation, or the error."""
    recorded: dict[str, Any] = {}
    for name, chat in CHATS.items():
        try:
            text = tokenizer.apply_chat_template(
                chat.messages,
                chat_template=template_source(template),
                tokenize=False,
                **chat.options,
            )
        except Exception as error:  # noqa: BLE001 - of the template
            recorded[name] = {"error": str(error)}
        else:
            recorded[name] = {"text": text}
            if name in ENCODED:
                recorded[name]["ids"] = tokenizer(text, add_special_tokens=False).input_ids
    return recorded


def main() -> None:
    """Record all families and templates."""
    loaded = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in FAMILIES.items():
            make().write(Path(folder) / name)
            loaded[name] = transformers.AutoTokenizer.from_pretrained(Path(folder) / name)
    recorded = {
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
        "texts": {name: texts_of(tokenizer) for name, tokenizer in loaded.items()},
        "chats": {
            template: chats_of(loaded[family], template) for template, family in PIPELINES.items()
        },
    }
    path = FOLDER / "recorded_tokenizers.json"
    path.write_text(json.dumps(recorded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
