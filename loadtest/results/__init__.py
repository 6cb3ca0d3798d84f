"""What a run found: its figures, result files, tables, pictures and comparisons."""
