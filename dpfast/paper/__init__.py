"""The tables and figures of arXiv 2502.15588: which runs make them, and its numbers beside those
measured.

A table is a file of ``dpfast/recipes/paper`` (``definition``). Its runs are calls of ``dpfast run``
(``runs``), which cost hours and disk (``cost``) and end on one page (``page``).
"""
