"""The landing page of the report: claims, main figures, how to read them, where the data is."""

from __future__ import annotations

from pathlib import Path

STYLE = Path(__file__).with_name("report.css")  # of the page and of the report around it
