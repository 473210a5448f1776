"""The README's figures: each comes from a script here, which prints its table."""
