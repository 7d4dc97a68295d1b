"""From the name of a model to its folder: `resolve_model` finds it, `download` fetches it from the Hugging Face hub."""

from nanovllm.config import BUNDLED_MODEL
from nanovllm.hub.downloads import MODEL_INFO, download, read_model_info
from nanovllm.hub.names import resolve_model

__all__ = ["BUNDLED_MODEL", "MODEL_INFO", "download", "read_model_info", "resolve_model"]
