"""Generated from protos/tinylm/v1/tinylm.proto by `make proto`; not edited by hand."""
