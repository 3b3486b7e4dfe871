"""The explorer: all results of a study in one page that sorts, filters and draws them."""
