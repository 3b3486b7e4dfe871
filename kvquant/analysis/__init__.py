"""From records to tables, tests, figures and claims: pure functions on tables and thin verbs."""
