"""Serving one artifact over HTTP: requests as batches, what the OpenAI routes say, and the ASGI application."""
