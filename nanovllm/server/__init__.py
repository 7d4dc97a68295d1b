"""The OpenAI-compatible HTTP API. Start reading at app.py."""
