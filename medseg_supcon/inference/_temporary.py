"""For this room, see `medseg_supcon.files`."""

from medseg_supcon.files import alone, remove_leftovers, temporary_name, write_whole

__all__ = ["alone", "remove_leftovers", "temporary_name", "write_whole"]
