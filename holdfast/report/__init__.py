"""What a record says: as a page, as terminal tables, as CSV. Loads neither torch nor drawing."""

from holdfast.report.card import check_license, record_beside, write_card, write_cards
from holdfast.report.page import find_records, pictures, write_report
from holdfast.report.tables import comparison_rows, run_rows, write_csv
from holdfast.report.terminal import as_text, comparison_table, matrix_table

__all__ = [
    "as_text",
    "check_license",
    "comparison_rows",
    "comparison_table",
    "find_records",
    "matrix_table",
    "pictures",
    "record_beside",
    "run_rows",
    "write_card",
    "write_cards",
    "write_csv",
    "write_report",
]
