"""The process that drives one job from spec to report: prepare, score, fan out, retry, quarantine."""
