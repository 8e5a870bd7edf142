"""A bundle as a local endpoint in the words of OpenAI's API (https://platform.openai.com/docs/api-reference).

messages.py   what may be asked, validated; what is answered
errors.py     what a client is told when something is wrong
writing.py    text and embeddings of an open bundle, step by step
engine.py     the one open model, in a thread of its own, and the bounded queue before it
endpoints.py  the addresses, streamed and whole
guard.py      who may ask: token, host names, content types
server.py     socket, model, server: from a bundle to the end of the command
"""
