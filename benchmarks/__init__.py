"""The claims of the README, each a script that prints its table."""
