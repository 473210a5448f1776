"""The command line ``medseg``: options, commands, printing."""

from medseg_supcon.cli.commands import app, main
