"""Answer requests over HTTP, in OpenAI's format: a thread that owns the engine, and an asyncio front before it."""
