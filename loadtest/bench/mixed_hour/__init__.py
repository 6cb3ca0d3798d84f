"""Mixed load for an hour on a service whose parts are reloaded and killed: what callers see, and the memory."""
