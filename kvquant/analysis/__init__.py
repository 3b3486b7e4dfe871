"""Makes tables, tests, figures and claims from records: pure functions on tables and thin verbs."""
