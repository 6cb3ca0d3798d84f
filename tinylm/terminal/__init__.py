"""The interactive story prompt, `tinylm write`, and what shells complete. Needs a terminal for its comforts only."""
