"""The numbers of the paper's text: each with its value and the records that it comes from."""
