"""From the rows of a sweep to optima, figures and reports."""
