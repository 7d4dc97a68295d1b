"""The endpoints of the OpenAI API, with the extensions of vLLM."""
