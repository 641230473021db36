"""Faults of a grader, kept apart from verdicts: they are never turned into a score."""


class GraderFault(RuntimeError):
    """The grader itself does not work (no sandbox, a worker that cannot start): no verdict can be given."""


class BadRow(GraderFault):
    """One row's own tests cannot be run (no tests, a syntax error in them): the row is at fault, not a completion."""
