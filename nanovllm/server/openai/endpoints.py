"""The endpoints that run the model: the server's routes, and what run-batch answers."""

from typing import Any

from nanovllm.server.openai.chat import CHAT
from nanovllm.server.openai.completions import COMPLETIONS
from nanovllm.server.openai.embeddings import EMBEDDINGS
from nanovllm.server.openai.endpoint import Endpoint
from nanovllm.server.openai.responses import RESPONSES

ENDPOINTS: tuple[Endpoint[Any], ...] = (COMPLETIONS, CHAT, RESPONSES, EMBEDDINGS)
