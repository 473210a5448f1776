"""How far to trust a mask, and a page to look at scans and masks."""

from medseg_supcon.quality.page import write_page
from medseg_supcon.quality.review import Entry, folder_entries, write_pictures
