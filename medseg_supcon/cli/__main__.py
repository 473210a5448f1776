"""``python -m medseg_supcon.cli``: the command line without an installed ``medseg``."""

from medseg_supcon.cli.commands import main

main()
