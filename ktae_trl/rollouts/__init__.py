"""From prompts to judged groups of rollouts: how they are drawn, which are right, and what the model says of them."""
