"""Batch jobs, `tinylm batch`: a file of requests in, a file of answers out, in the form of OpenAI's batch API.

`lines` has the form of both files. `output` finds where an interrupted job stopped. `engine` answers lines,
`processes` does so on all cores, and `on_ray` on a Ray cluster. `job` joins them.
"""
