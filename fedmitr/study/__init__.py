"""The evidence: equal tuning, the study that a protocol fixes before it runs, and verdicts on claims."""
