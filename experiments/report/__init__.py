"""From results to verdicts, tables, figures and the paper."""
