"""OpenAI's completions: the check of a request, and the form of its answer, for HTTP and for batch jobs.

It needs neither the engine nor the service: it gets the pieces of answers from them.
"""
