"""From prompts to graded groups of rollouts: sampling, correctness, and the credit methods' access to the trainer."""
