"""`python -m fused_ce bench`: every loss beside its rivals, checked and then timed in turn."""
