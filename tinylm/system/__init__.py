"""The operating system: files, text as people save it, paths of packaged files, and the machine."""
