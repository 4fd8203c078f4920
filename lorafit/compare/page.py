from __future__ import annotations


def compare_page(answer: object, found: object, comparison: object) -> str:
    return ""
