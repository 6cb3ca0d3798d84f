"""The figures of runs, and their result files, tables, pictures and comparisons."""
