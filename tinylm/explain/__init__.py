"""Show what the model computes for a short text: attention, logit lens, rounding, and how settings choose a token.

`explainer` runs the reference kernels and answers questions with `results`. `filters` applies the settings of a request
one by one. `engine_answer` is the next token by an engine, to compare. `forms` encodes results. `worker` is a process
that answers a service.
"""
