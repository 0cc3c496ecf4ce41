"""An OpenAI-compatible server over the engine.

A request passes `connection` (limits below HTTP), `door` (Host, key), `app` (routes), `body` and `schema` (what it
says), `limits` (whether there is room), `chat`, `completions` or `embeddings` (what it means), `work` (the engine's
answer) and `stream` (how it goes out). `life` starts and ends it all, `service` is what they share.
"""
