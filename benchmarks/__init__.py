"""The numbers in the README: each comes from a script here, which prints its table."""
