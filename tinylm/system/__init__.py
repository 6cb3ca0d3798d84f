"""The operating system: files, text as people save it, where packaged files are, and the machine."""
