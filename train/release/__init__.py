"""The evaluation, the pages and the other formats of an exported model. No module imports PyTorch."""
