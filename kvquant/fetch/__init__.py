"""Models and texts from their sources into a checked local folder."""
