"""The sparse feed-forward of Phi-3.5-MoE: routing, experts, expert parallelism."""
