"""What a measurement leaves: a folder of arrays and pictures, and one page to read it by."""

from .folder import check_folder as check_folder
from .folder import write_report as write_report
from .page import write_page as write_page
