"""One self-contained HTML page of a run, by which it is read."""

from .render import check_page as check_page
from .render import render as render
from .render import write_page as write_page
from .source import Measured as Measured
from .source import read_measured as read_measured
