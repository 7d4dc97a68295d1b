"""Model names to folders: bundled, downloaded, cached, or fetched from the Hugging Face hub.

In reading order:

names      resolve the names of a model and its draft model to folders
downloads  download a model into a folder
repo       a repository of the hub at one commit
transfer   HTTP transfers with limits and retries
inventory  list and remove models and kernels on this machine
"""

from nanovllm.config import BUNDLED_MODEL
from nanovllm.hub.downloads import MODEL_INFO, download, read_model_info
from nanovllm.hub.names import resolve_model, resolve_models

__all__ = [
    "BUNDLED_MODEL",
    "MODEL_INFO",
    "download",
    "read_model_info",
    "resolve_model",
    "resolve_models",
]
