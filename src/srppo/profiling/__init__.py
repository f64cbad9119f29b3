"""What a run costs while it runs: seconds and memory by phase and by stage, and a profiler's trace for experts."""
