"""lm-evaluation-harness: its tasks put to a model of ours, from its command line or from `dirl eval`."""
