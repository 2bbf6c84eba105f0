"""How rollouts are drawn where TRL draws them in no such way: dynamic sampling (DAPO)."""
