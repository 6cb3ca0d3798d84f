"""The service over HTTP: OpenAI's completions API, the web page, and the live view of all replicas."""
