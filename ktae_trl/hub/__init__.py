"""A run's folder for others: its model card, its upload, and adapters or shards merged into one model."""
