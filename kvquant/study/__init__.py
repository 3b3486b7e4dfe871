"""A study, without torch: its typed configuration, digests, grid, records and schema."""
