"""Reinforcement learning: groups of answers, rewarded, and the policy updated on the states that led to them."""
