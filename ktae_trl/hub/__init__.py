"""Publishes a run: model card, upload to the Hub, and merging adapters or shards into one model."""
